# SPDX-License-Identifier: Apache-2.0
"""`python -m ascend_eplb` is `ascend-eplb`."""

import sys

from ascend_eplb.cli import main

if __name__ == "__main__":
    sys.exit(main())
