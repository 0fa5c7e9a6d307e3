"""Writes the toy world as nine benchmarks, each in the files that LLaVA's evaluation expects of the real one.

    vqav2, gqa, MME, mmbench, mmbench_cn, pope, seed_bench, scienceqa, textvqa     as under playground/data/eval
    truth.json     by benchmark: each question's id, image, words and right answer, straight from the scenes

All scenes are of the test split. An entry of `truth.json` has the `id` of the benchmark's own files, the `image` below
the folder (MMBench, whose images are inside its table: the table), the `question` without options and instruction, the
right `answer` (case aside; of a choice the letter, with the option's words in `means`), and the `group` by which the
benchmark reports. Where one or two of VQA's ten people disagree, `also` has the share of a point that they are worth.
`vqav2` is the validation split, `vqav2_test` the test, whose answers no other file has.
"""

import argparse
import json
import sys
from pathlib import Path

from ..utils.errors import ViCAError
from ..utils.files import whole_folder
from ..utils.program import exit_status
from . import benchmark_choices, benchmark_mmbench, benchmark_words, benchmark_yesno

FOLDER = Path("playground/toy/eval")
WRITERS = {
    "vqav2": benchmark_words.write_vqav2,
    "vqav2_test": benchmark_words.write_vqav2_test,
    "gqa": benchmark_words.write_gqa,
    "mme": benchmark_yesno.write_mme,
    "mmbench": benchmark_mmbench.write_mmbench,
    "mmbench_cn": benchmark_mmbench.write_mmbench_cn,
    "pope": benchmark_yesno.write_pope,
    "seed": benchmark_choices.write_seed,
    "sqa": benchmark_choices.write_sqa,
    "textvqa": benchmark_words.write_textvqa,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vica.toy.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help=f"must be empty or new (default: {FOLDER})")
    parser.add_argument("--pictures", type=int, default=24, metavar="N", help="pictures a benchmark (default: 24)")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    return exit_status("vica.toy.benchmarks", lambda: run(parser.parse_args(argv)))


def run(args) -> None:
    truth = write(args.out, args.pictures, args.seed)
    print(f"{args.out}: " + ", ".join(f"{name} {len(entries)}" for name, entries in truth.items()) + " questions")


def write(folder: Path, pictures: int = 24, seed: int = 0) -> dict[str, list[dict]]:
    """Writes all benchmarks and returns the content of `truth.json`. The folder appears whole or not at all."""
    folder = Path(folder)
    if pictures < 1:
        raise ViCAError(f"pictures is {pictures}; it must be 1 at least")
    with whole_folder(folder) as partial:
        truth = {name: write_one(partial, pictures, seed) for name, write_one in WRITERS.items()}
        (partial / "truth.json").write_text(json.dumps(truth, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return truth


if __name__ == "__main__":
    sys.exit(main())
