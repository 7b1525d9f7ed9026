"""Part 4: whole trainings of MiniLM on GLUE's small tasks, by `examples.glue.experiments`

That program has the options of a part, and more; it is started, not imported.
"""

import os
import sys

from scripts.gpu.part import part_options

NEEDED = ("minilm/config.json", "glue/RTE/train.tsv")  # of the kit


def main() -> int:
    """Become that program; return 2 if it lacks its files."""
    args = part_options("trainings", __doc__).parse_known_args()[0]
    kit = args.kit
    missing = [name for name in NEEDED if not (kit / name).is_file()]
    if not missing:
        program = [sys.executable, "-m", "examples.glue.experiments", *sys.argv[1:]]
        os.execv(sys.executable, program + ["--dry-run"] * (args.device == "cpu"))
    remedy = "give (KIT=FOLDER of first_run.sh) the folder that docs/gpu.md describes"
    print(f"--kit {kit}: {' and '.join(missing)} are missing; {remedy}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
