# SPDX-License-Identifier: Apache-2.0
"""What only API servers load: routes, sessions, admission, metrics, the supervisor."""
