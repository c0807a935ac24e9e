# SPDX-License-Identifier: Apache-2.0
"""``python -m qwen3_asr_vllm.cli``, which needs no script on the PATH."""

import sys

from . import main

sys.exit(main())
