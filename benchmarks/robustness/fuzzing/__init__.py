# SPDX-License-Identifier: Apache-2.0
"""The cases of ``fuzz.py`` by kind of input, each made from its number alone."""
