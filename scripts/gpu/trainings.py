"""Part 4: whole trainings of MiniLM on GLUE's small tasks, by `examples.glue.experiments`

That program has the options of a part, and more; it is started, not imported.
"""

import os
import sys

if __name__ == "__main__":
    os.execv(sys.executable, [sys.executable, "-m", "examples.glue.experiments", *sys.argv[1:]])
