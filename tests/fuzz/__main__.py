# SPDX-License-Identifier: GPL-2.0-or-later
import sys

from tests.fuzz.loop import main

sys.exit(main())
