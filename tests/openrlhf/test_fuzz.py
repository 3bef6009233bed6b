"""Any words on a command line under this package's flags: the run trains as it says, or one error
names the flag."""

from __future__ import annotations

import math
import os
import random
import re
from collections.abc import Callable

from focalpo_plugins import VARIANTS

MODEL = "nobody/no-such-model"
LOOKS_FOR_MODEL = "openrlhf/models/actor.py"
START = ["--model.model_name_or_path", MODEL, "--ds.attn_implementation", "eager"]
FLAGS = ("--loss", "--focalpo.gamma", "--focalpo.variant", "--focalpo.allow_reversed",
         "--focalpo.precompute_ref", "--focalpo.precompute_dir", "--model.beta",
         "--model.label_smoothing", "--model.ipo_enable")  # fmt: skip
VALUES = ("0.05", "5e-2", "-1", "1.4427", "1e400", "nan", "-inf", "0x10", "", " ", "0,5", "٠٫٥", "{}",
          "[1]", "%s", "%(default)s", "$HOME", "dpo", "focalpo", "correct", "incorrect",
          "correct_exact", "--", "-", "true", "\u202e", "é" * 40, "1_000")  # fmt: skip


def command_line(draw: random.Random) -> list[str]:
    """Up to four words or pairs of words, mostly under this package's flags, sometimes misspelt."""
    words = ["--loss", "focalpo"] if draw.random() < 0.7 else []
    for _ in range(draw.randint(0, 3)):
        flag = draw.choice(FLAGS)
        if draw.random() < 0.2:
            at = draw.randrange(2, len(flag))
            flag = flag[:at] + draw.choice(["", flag[at] * 2, "_", "."]) + flag[at + 1 :]
        value = draw.choice(VALUES) if draw.random() < 0.8 else repr(draw.uniform(-2, 2))
        words += draw.choice([[flag], [flag, value], [f"{flag}={value}"]])
    return words


def test_any_command_line(commands: Callable):
    draw = random.Random(20250106)
    count = int(os.environ.get("FUZZ_EXAMPLES", "60"))  # `nox -s fuzz` has many more
    argvs = [command_line(draw) for _ in range(count)]
    ends = commands([[*START, *argv] for argv in argvs])
    refused = 0
    for argv, (code, output) in zip(argvs, ends, strict=True):
        if code == 2:
            refused += 1
            last = output.strip().splitlines()[-1]
            assert re.search(r"error: .*(--|got |unrecognized)", last), (argv, output)
            assert "Traceback" not in output, (argv, output)
        else:
            # Accepted: it gets as far as looking for the model, which doesn't exist, with the given
            # values.
            assert LOOKS_FOR_MODEL in output, (argv, code, output)
            for flag, value in re.findall(r"(--\S+)(?: |=)([^- ]\S*)", " ".join(argv)):
                assert flag in FLAGS, argv
                if flag == "--focalpo.gamma":
                    assert 0 <= float(value) < math.inf, argv
                if flag == "--focalpo.variant":
                    assert value in VARIANTS, argv
    assert 0.2 < refused / count < 0.96
