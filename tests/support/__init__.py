# SPDX-License-Identifier: Apache-2.0
"""Helpers of tests and benchmarks: audio, checkpoints, engines, servers, clients, checks."""
