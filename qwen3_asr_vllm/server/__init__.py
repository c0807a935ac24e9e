# SPDX-License-Identifier: Apache-2.0
"""API server: routes, sessions, admission, metrics, the supervisor."""
