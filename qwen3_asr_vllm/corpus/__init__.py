# SPDX-License-Identifier: Apache-2.0
"""Transcribe whole corpora: sources, outputs, a client of a server, Ray Data, evaluation."""
