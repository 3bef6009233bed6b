"""pipeline.py from models.yml to the filled table, with stand-ins for vLLM, the judges and Arena-Hard's
scripts, and the real alpaca_eval and lm-eval."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from unittest import mock

import alpaca_eval
import numpy as np
import pandas as pd
import pytest
import yaml
from chat_formats import mistral_tokenizer
from harness import EXAMPLES, SUPPORT, free_port
from lm_eval_tasks import QUESTIONS, write_tasks
from stand_in import StandIn

# The value of the two sides' texts, by question. For two texts worth a and b, a judge of AlpacaEval
# gives the first a / (a + b).
WORTH = [(3, 1), (1, 1), (1, 4), (1, 3), (9, 1), (1, 1), (2, 3), (7, 3)]
WALK = "How long will it take to walk around the world, assuming that would be possible?"
# Arena-Hard's questions; three times as good, or more, is much better, and weighs 3.
ARENA = [(3, 1), (1, 1), (1, 4), (2, 3)]
# How much better the models' answers are than requested.
BETTER = {"llama3_focalpo_sweep-sweep0001": 1, "llama3_focalpo_sweep-sweep0003": 1}

MODELS = """
  - name: llama3_focalpo
    path: tiny
    method: FocalPO
    format: llama3
    bos_in_prompt: true
  - name: llama3_focalpo_sweep
    path: runs/sweep*
    method: FocalPO
    format: llama3
    bos_in_prompt: true
  - name: mistral_dpo
    path: mistral
    method: DPO
    format: zephyr
    empty_system: true
  - name: mistral_kto
    path: outputs/not_trained_yet
    method: KTO
    format: zephyr
"""
SCRIPT = EXAMPLES / "eval" / "pipeline.py"
RATES = {"sweep0001": 1e-6, "sweep0002": 5e-7, "sweep0003": 6e-7}

# Arena-Hard's two scripts as far as its files are concerned, written for this test: the same arguments,
# the same keys, the same files.
COMMON = """
import argparse, json, os, re, urllib.request
from pathlib import Path
import yaml

parser = argparse.ArgumentParser()
parser.add_argument("--setting-file")
parser.add_argument("--endpoint-file")
args = parser.parse_args()
setting = yaml.safe_load(open(args.setting_file))
endpoints = yaml.safe_load(open(args.endpoint_file))
data = Path("data") / setting["bench_name"]
lines = lambda path: [json.loads(line) for line in path.read_text().splitlines()]

def ask(name, messages):
    places = endpoints[name]["endpoints"]
    base = places[0]["api_base"] if places else os.environ["OPENAI_BASE_URL"]
    body = {"model": endpoints[name]["model_name"], "messages": messages}
    body |= {"temperature": setting["temperature"], "max_tokens": setting["max_tokens"]}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(base + "/chat/completions", json.dumps(body).encode(), headers)
    return json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"]
"""
GEN_ANSWER = """
(model,) = setting["model_list"]
with open(data / "model_answer" / (model + ".jsonl"), "w") as file:
    for question in lines(data / "question.jsonl"):
        text = ask(model, [{"role": "user", "content": question["turns"][0]["content"]}])
        choices = [{"index": 0, "turns": [{"content": text}]}]
        row = {"question_id": question["question_id"], "model_id": model, "choices": choices}
        file.write(json.dumps(row) + chr(10))
"""
GEN_JUDGMENT = """
(model,) = setting["model_list"]
(template,) = setting["prompt_template"]
judge, pattern = setting["judge_model"], re.compile(setting["regex_pattern"])
texts = lambda name: {row["question_id"]: row["choices"][0]["turns"][0]["content"]
                      for row in lines(data / "model_answer" / (name + ".jsonl"))}
ours, theirs = texts(model), texts(setting["baseline_model"])
file = data / "model_judgment" / judge / (model + ".jsonl")
file.parent.mkdir(parents=True, exist_ok=True)
with open(file, "w") as out:
    for question in lines(data / "question.jsonl"):
        key, games = question["question_id"], []
        for first, second in [(theirs[key], ours[key]), (ours[key], theirs[key])]:
            asked = template.format(question_1="?", answer_1=first, answer_2=second)
            messages = [{"role": "system", "content": setting["system_prompt"]}]
            told = ask(judge, [*messages, {"role": "user", "content": asked}])
            games.append({"score": pattern.findall(told)[0]})
        out.write(json.dumps({"question_id": key, "model": model, "games": games}) + chr(10))
"""


def write_arena(folder: Path) -> None:
    data = folder / "data" / "arena-hard-v0.1"
    (data / "model_answer").mkdir(parents=True)
    (folder / "config").mkdir()
    (folder / "gen_answer.py").write_text(COMMON + GEN_ANSWER)
    (folder / "gen_judgment.py").write_text(COMMON + GEN_JUDGMENT)
    prompts = {
        "system_prompt": "Be fair.",
        "prompt_template": ["{question_1} {answer_1} {answer_2}"],
    }
    config = {"judge_model": "another", "temperature": 1, **prompts, "model_list": ["another"]}
    (folder / "config" / "judge_config.yaml").write_text(yaml.safe_dump(config))
    with (
        open(data / "question.jsonl", "w") as questions,
        open(data / "model_answer" / "gpt-4-0314.jsonl", "w") as baseline,
    ):
        for i, (ours, theirs) in enumerate(ARENA):
            turns = [{"content": f"Write {i} worth {ours}"}]
            questions.write(json.dumps({"question_id": str(i), "turns": turns}) + "\n")
            choices = [{"index": 0, "turns": [{"content": f"answer worth {theirs}"}]}]
            row = {"question_id": str(i), "model_id": "gpt-4-0314", "choices": choices}
            baseline.write(json.dumps(row) + "\n")


def write_hub_cache(folder: Path) -> None:
    """The one file that the length-controlled rate fetches from the hub: the judgments of two models
    that play for length, which the regression is fitted on as well. Made up: neither length nor
    question matters in it."""
    repo = folder / "hub" / "datasets--tatsu-lab--alpaca_eval"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = 2 * len(WORTH)
    pd.DataFrame(
        {
            "model": "gamed",
            "preference": 0.5,
            "index": list(range(len(WORTH))) * 2,
            "std_delta_len": rng.normal(size=rows),
            "instruction_difficulty": list(rng.normal(size=len(WORTH))) * 2,
            "not_gamed_baseline": False,
        }
    ).to_csv(snapshot / "df_gamed.csv", index=False)


class Place:
    """A folder with models.yml, models, data and the command `vllm`."""

    def __init__(self, folder: Path, tiny: Path, judge: StandIn, pipeline: ModuleType) -> None:
        self.folder, self.pipeline = folder, pipeline
        plan = yaml.safe_load((EXAMPLES / "eval" / "models.yml").read_text())
        plan |= {"models": yaml.safe_load(MODELS), "port": int(free_port())}
        tasks = folder / "tasks"
        tasks.mkdir()
        write_tasks(tasks)
        here = [str(EXAMPLES / "eval" / "tasks"), str(tasks)]
        plan["lm_eval"] |= {"dtype": "float32", "device": "cpu", "include_path": here}
        (folder / "models.yml").write_text(yaml.safe_dump(plan, sort_keys=False))
        shutil.copytree(tiny / "model", folder / "tiny")
        for name, rate in RATES.items():
            run = folder / "runs" / name
            shutil.copytree(tiny / "model", run)
            log = [{"learning_rate": rate * share, "step": 1} for share in (0.5, 1, 0)]
            (run / "checkpoint-3").mkdir()
            state = json.dumps({"log_history": [*log, {"eval_loss": 1}]})
            (run / "checkpoint-3" / "trainer_state.json").write_text(state)
        mistral_tokenizer().save_pretrained(folder / "mistral")
        (folder / "mistral" / "config.json").write_text(json.dumps({"model_type": "mistral"}))
        rows = [
            {
                "dataset": "made_up",
                "instruction": f"{WALK if i == 0 else i} Write a text worth {ours}",
                "output": f"reference worth {theirs}",
                "generator": "reference",
            }
            for i, (ours, theirs) in enumerate(WORTH)
        ]
        (folder / "alpaca.json").write_text(json.dumps(rows))
        write_arena(folder / "arena-hard")
        (folder / "bare").mkdir()
        (folder / "bare" / "gen_judgment.py").touch()
        write_hub_cache(folder / "hf")
        vllm = folder / "vllm"
        vllm.write_text(f'#!/bin/sh\nexec {sys.executable} {SUPPORT / "stand_in.py"} "$@"\n')
        vllm.chmod(0o755)
        # A copy: the real one writes its regression's weights into its own folder.
        shutil.copytree(Path(alpaca_eval.__file__).parent, folder / "site" / "alpaca_eval")
        gone = ("OPENAI_", "PYTHONPATH", "STAND_IN")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(gone)} | {
            "PYTHONPATH": str(folder / "site"),
            "OPENAI_BASE_URL": judge.url,
            "STAND_IN": json.dumps({"better": BETTER, "log": str(folder / "asked.jsonl")}),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(folder / "hf"),
            "TOKENIZERS_PARALLELISM": "false",
        }

    def command(self, *arguments: str) -> list[str]:
        options = ["--file", "models.yml", "--vllm", "./vllm", "--out", "out", "--resamples", "2"]
        return [str(SCRIPT), *arguments, *options, "--alpaca-data", "alpaca.json"]

    def here(self, *arguments: str, code: int = 0) -> str:
        """The same in this process, which has imported what it needs, for commands that serve no
        model and have nothing judged."""
        told = io.StringIO()
        with (
            mock.patch.dict(os.environ, self.env, clear=True),
            mock.patch.object(sys, "argv", self.command(*arguments)),
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(told),
        ):
            if code == 0:
                self.pipeline.main()
                return told.getvalue()
            with pytest.raises(SystemExit) as ended:
                self.pipeline.main()
        return str(ended.value)

    def __call__(self, *arguments: str, code: int = 0, **variables: str) -> str:
        """Standard output, and the message of a run that fails."""
        done = subprocess.run(
            [sys.executable, *self.command(*arguments)],
            cwd=self.folder,
            env=self.env | variables,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == code, done.stdout[-3000:] + done.stderr[-6000:]
        return done.stdout if code == 0 else done.stderr

    def asked(self) -> list[dict]:
        """The requests to each started server."""
        return [json.loads(line) for line in (self.folder / "asked.jsonl").read_text().splitlines()]


@pytest.fixture
def place(tmp_path: Path, tiny: Path, stand_in: StandIn, pipeline: ModuleType) -> Place:
    return Place(tmp_path, tiny, stand_in, pipeline)


def cells(output: str) -> dict[str, dict[str, str]]:
    """By model, then by column; this project's columns after the paper's."""
    found: dict[str, dict[str, str]] = {}
    for line in output.splitlines():
        if line.startswith("| method"):
            head, paper = [], ""
            for name in line.strip("| ").split(" | "):
                ours = name == "yours" or name.endswith(" judge")
                head.append(f"{paper}, {name}" if ours else name)
                paper = paper if ours else name
        elif line.startswith("|") and "---" not in line:
            row = [cell.strip() for cell in line[1:-1].split("|")]
            assert len(row) == len(head)
            found.setdefault(row[1], {}).update(dict(zip(head, row, strict=True)))
    return found


def win_rate(better: int) -> str:
    """The mean of the judge's shares, and their standard deviation over the square root of eight."""
    shares = [100 * (a + better) / (a + better + b) for a, b in WORTH]
    mean = sum(shares) / 8
    return f"{mean:.1f} ± {math.sqrt(sum((x - mean) ** 2 for x in shares) / 7 / 8):.1f}"


def test_from_models_to_the_table(place: Place, stand_in: StandIn):
    """The whole way. By hand, for the models that answer as asked: the shares 3/4, 1/2, 1/5, 1/4,
    9/10, 1/2, 2/5 and 7/10 add up to 4.2 of 8, which is 52.5; Arena-Hard's games are won 6 of 6, 1 of
    2, 0 of 6 and 0 of 2, which is 7 of 16, and the rest of each, 27/8, 1/8, -21/8 and -7/8, squares to
    19.0625, so that the error is sqrt(4/3 * 19.0625) / 16 = 31.5.

    One worth more: Arena-Hard's pairs are 4:1, 2:1, 2:4 and 3:3, won 6 of 6, 2 of 2, 0 of 2, 1 of 2:
    9 of 12."""
    told = place("generate", "--benchmarks", "alpaca_eval", "arena_hard")
    assert "mistral_kto: left out, no model in outputs/not_trained_yet\n" in told
    served = [each["arguments"]["served_model_name"].rpartition("-") for each in place.asked()]
    ((_, mark),) = {(dash, mark) for _, dash, mark in served}
    servers = {name: each for (name, *_), each in zip(served, place.asked(), strict=True)}
    sweep = [f"llama3_focalpo_sweep-{name}" for name in RATES]
    assert list(servers) == ["llama3_focalpo", *sweep, "mistral_dpo"]
    given = servers["llama3_focalpo"]["arguments"]
    assert (given["model"], given["dtype"]) == ("tiny", "bfloat16")
    template = Path(given["chat_template"])
    assert template.parent.name == "llama3_focalpo" and template.is_file()
    for name, each in servers.items():
        llama = name.startswith("llama3")
        for asked in each["completions"]:
            sampling = asked["temperature"], asked["max_tokens"], asked["top_p"]
            assert sampling == ((0.9, 4096, 1.0) if llama else (0.7, 2048, 1.0))
            assert asked.get("stop_token_ids") == ([128001, 128009] if llama else None)
            assert asked["model"] == f"{name}-{mark}" and asked["add_special_tokens"] is True
        prompts = [prompt for asked in each["completions"] for prompt in asked["prompt"]]
        start = (
            "<|begin_of_text|><|start_header_id|>user" if llama else "<|system|>\n</s>\n<|user|>"
        )
        assert len(prompts) == 8 and all(prompt.startswith(start) for prompt in prompts)
        assert len(each["chats"]) == 4  # Arena-Hard's, greedily
        assert {asked["model"] for asked in each["chats"]} == {f"{name}-{mark}"}
        assert {(asked["temperature"], asked["max_tokens"]) for asked in each["chats"]} == {
            (0, 4096)
        }
    place("generate", "--benchmarks", "lm_eval", "--models", "llama3_focalpo")
    assert len(place.asked()) == 5, "lm-eval loads the model itself"

    place("judge")
    judge = place.asked()[-1]
    assert judge["arguments"]["model"] == "Qwen/Qwen2.5-72B-Instruct"
    assert judge["arguments"]["tensor_parallel_size"] == "4"
    assert len(judge["judgments"]) == 5 * 8 and len(judge["chats"]) == 5 * 4 * 2
    for asked in judge["judgments"]:
        assert asked["model"].startswith("qwen2.5-72b-instruct-")
        assert not asked["model"].endswith(mark), "each run has its own"
        assert (asked["logprobs"], asked["top_logprobs"], asked["max_tokens"]) == (True, 20, 1)
    assert stand_in.judgments == [], "the paper's judge wasn't asked"
    paper = ["judge", "--judge", "paper", "--models", "llama3_focalpo"]
    assert "OPENAI_API_KEY isn't set" in place.here(*paper, code=1)
    place(*paper, OPENAI_API_KEY="unused")
    assert len(place.asked()) == 6, "no server for the paper's judge"
    assert len(stand_in.judgments) == 8 and len(stand_in.chats) == 8
    for asked in stand_in.judgments:
        assert asked["model"] == "gpt-4-1106-preview"
        assert (asked["logprobs"], asked["top_logprobs"], asked["max_tokens"]) == (True, 5, 1)

    output = place.here("table")
    for column in ("WR", "LC", "Arena-Hard"):
        assert output.count(f"| {column} | yours | other judge |") == 2
    rows = cells(output)
    chosen = "llama3_focalpo_sweep-sweep0003, lr 6e-07, chosen"
    names = ["llama3_focalpo", "llama3_focalpo_sweep-sweep0001, lr 1e-06"]
    names += ["llama3_focalpo_sweep-sweep0002, lr 5e-07", chosen, "mistral_dpo", "mistral_kto"]
    assert sorted(rows) == sorted(names)
    own = rows["llama3_focalpo"]
    assert own["method"] == "FocalPO"
    assert (own["WR"], own["LC"], own["Arena-Hard"]) == ("49.8", "54.7", "34.6")
    assert rows["mistral_dpo"]["WR"] == "18.6" and rows["mistral_dpo"]["MMLU"] == "57.4"
    # Both judges are the same stand-in; the paper's has judged one model.
    assert win_rate(0).startswith("52.5 ± ")
    for name in (names[0], names[2], names[4]):
        assert rows[name]["WR, other judge"] == win_rate(0)
        assert rows[name]["Arena-Hard, other judge"] == "43.8 ± 31.5"
    for name in (names[1], chosen):
        assert rows[name]["WR, other judge"] == win_rate(1)
        assert rows[name]["Arena-Hard, other judge"].startswith("75.0 ± ")
    assert own["WR, yours"] == win_rate(0) and own["Arena-Hard, yours"] == "43.8 ± 31.5"
    # With eight questions the regression does less than with 805: it pulls the rates towards a
    # half. In the made-up judgments length has no effect, so controlling for it changes little
    # else.
    for name, rate in ((names[0], 52.5), (chosen, float(win_rate(1).split()[0]))):
        short = name.split(",")[0]
        board = place.folder / "out/alpaca_eval/simpo" / short / "other" / "leaderboard.csv"
        row = pd.read_csv(board, index_col=0).loc[short]
        lc, error = row["length_controlled_winrate"], row["lc_standard_error"]
        assert rows[name]["LC, other judge"] == f"{lc:.1f} ± {error:.1f}"
        assert lc == pytest.approx(rate, abs=10) and 50 <= lc <= rate
    assert 0 < error < 30
    assert own["LC, yours"] == own["LC, other judge"]
    for name in names[1:]:
        assert rows[name]["WR, yours"] == rows[name].get("HellaSwag, yours", "") == ""
    assert {rows["mistral_kto"][c] for c in rows["mistral_kto"] if c.endswith("judge")} == {""}
    # sweep0001 and sweep0003 are equally good, so the smaller rate wins.
    assert "llama3_focalpo_sweep: learning rate 6e-07, LC " in output
    assert output.rstrip().endswith("by the other judge, of 3 folders.")

    # lm-eval's: right answers of six, and sqrt(p (1 - p) / 5); the average is over acc_norm.
    (folder,) = (place.folder / "out/lm_eval/llama3_focalpo").iterdir()
    right = {}
    for path in folder.glob("samples_*.jsonl"):
        task = path.name.removeprefix("samples_").rpartition("_")[0]
        right[task] = [json.loads(line) for line in path.read_text().splitlines()]

    def share(task: str, metric: str) -> tuple[float, float]:
        values = [float(sample[metric]) for sample in right[task]]
        p, n = sum(values) / len(values), len(values)
        spread = math.sqrt(sum((x - p) ** 2 for x in values) / (n - 1) / n)
        return 100 * p, 100 * spread

    for column, task in (("HellaSwag", "hellaswag"), ("ARC", "arc_challenge")):
        p, error = share(task, "acc")
        assert len(right[task]) == len(QUESTIONS) == 6
        assert own[f"{column}, yours"] == f"{p:.1f} ± {error:.1f}"
    rest = [
        float(own[f"{c}, yours"].split(" ± ")[0]) for c in ("TruthfulQA", "WinoGrande", "GSM8K")
    ]
    rest.append(float(own["MMLU, yours"].split(" ± ")[0]))
    both = {
        m: [share(task, m)[0] for task in ("hellaswag", "arc_challenge")]
        for m in ("acc", "acc_norm")
    }
    assert both["acc"] != both["acc_norm"], "or nothing is told apart"
    for column, metric in (("average", "acc_norm"), ("mean of the six", "acc")):
        mean = (sum(both[metric]) + sum(rest)) / 6
        assert float(own[f"{column}, yours"].split(" ± ")[0]) == pytest.approx(mean, abs=0.11)

    # Tables 3 and 4.
    told = place.here("answers", "--models", "llama3_focalpo", "llama3_focalpo_sweep-sweep0001")
    parts = told.split("## ")
    assert len(parts) == 3 and all(WALK in part for part in parts[1:])
    assert parts[1].rstrip().endswith("answer worth 3") and parts[2].rstrip().endswith("worth 4")
    # A second call has nothing left to do.
    before = place.asked()
    place.here("generate", "--benchmarks", "alpaca_eval")
    assert place.asked() == before


def test_some_questions_then_the_rest(place: Place):
    """Selected questions in LION's decoding, then the others. The number of judged questions is
    printed, and nothing is judged twice."""
    lion = ["--decoding", "lion", "--benchmarks", "alpaca_eval"]
    place("generate", "--models", "llama3_focalpo", *lion)
    place("generate", "--models", "mistral_dpo", *lion, "--question", "worth 1")

    def prompts() -> list[str]:
        return [prompt for asked in place.asked()[-1]["completions"] for prompt in asked["prompt"]]

    assert len(prompts()) == 4 and all("worth 1" in prompt for prompt in prompts())
    for asked in place.asked()[-1]["completions"]:
        assert (asked["temperature"], asked["max_tokens"], asked["top_p"]) == (1.0, 2048, 0.7)
    place("judge", *lion)
    assert len(place.asked()[-1]["judgments"]) == 8 + 4
    said = "mistral_dpo: WR and LC by the other judge are over 4 of 8 questions."
    assert said in place.here("table", *lion)
    told = place.here("answers", *lion, "--question", "Write a text worth 1")
    assert told.count("answer worth 1") == 8  # four questions, two models

    place("generate", "--models", "mistral_dpo", *lion)
    assert len(prompts()) == 4 and not any("worth 1" in prompt for prompt in prompts())
    place("judge", *lion)
    assert len(place.asked()[-1]["judgments"]) == 4
    table = place.here("table", *lion)
    assert "of 8 questions" not in table
    assert cells(table)["mistral_dpo"]["WR, other judge"] == win_rate(0)
    wrong = place.here("answers", "--question", "no such", *lion, code=1)
    assert "no answer to a question with 'no such'" in wrong


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["judge", "--judge", "him"], "--judge: one of other, paper, got him."),
        (["table", "--decoding", "warm"], "--decoding: one of simpo, greedy, lion, got warm."),
        (["generate", "--models", "x"], "mistral_dpo, mistral_kto; got x."),
        (["judge", "--models", "x"], "mistral_dpo, mistral_kto; got x."),
        (["judge", "--arena-hard", "no"], "--arena-hard is a checkout of Arena-Hard-Auto, got "),
        (
            ["generate", "--arena-hard", "bare"],
            "--arena-hard has its data in data/arena-hard-v0.1, got no ",
        ),
        (["generate", "--arena-python", "no"], "--arena-python is a command, got no, which isn't"),
        (
            ["generate", "--models", "mistral_kto"],
            "mistral_kto: no model in outputs/not_trained_yet.",
        ),
        (["generate", "--arena-hard", "no"], "--arena-hard is a checkout of Arena-Hard-Auto, got "),
        (["generate", "--in-process"], "--in-process takes --models with one name"),
        (["table", "--results", "models.yml"], "got none in models.yml."),
    ],
)
def test_errors(arguments: list[str], said: str, place: Place):
    """Each in one line, before anything is served."""
    told = place.here(*arguments, code=1)
    assert said in told and "\n" not in told
    assert not (place.folder / "asked.jsonl").exists()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["table", "--resamples", "0"], "--resamples is at least 1, got 0"),
        (["table", "--out", "{file}"], "--out is a folder, got "),
        (["configs", "--out", "{file}/x"], "--out is a folder, got "),
        (["table", "--file", "{folder}"], "--file is a file, got "),
        (["table", "--file", "{folder}/none.yml"], "--file is a YAML such as models.yml, got "),
        (["table", "--file", "{file}"], " without models."),
        (["table", "--results", "{folder}/none.md"], "--results is a file with the paper's tables"),
    ],
)
def test_wrong_options(
    arguments: list[str],
    said: str,
    pipeline: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    (tmp_path / "a.yml").write_text("port: 8000\n")
    words = [word.format(file=tmp_path / "a.yml", folder=tmp_path) for word in arguments]
    monkeypatch.setattr(sys, "argv", ["pipeline.py", *words])
    with pytest.raises(SystemExit) as ended:
        pipeline.main()
    assert said in capsys.readouterr().err + str(ended.value)


def test_a_command_that_is_missing(pipeline: ModuleType):
    with pytest.raises(SystemExit, match="--vllm is a command, got no_such_vllm"):
        pipeline.executable("no_such_vllm", "--vllm")


SERVE = """
import sys, time
sys.path[:0] = [{folder!r}]
import pipeline
plan = pipeline.Plan([], {{"port": {port}}}, None)
with pipeline.served(plan, "./vllm", "tiny", "one", ["--max-model-len", "8"]):
    print("up", flush=True)
    {rest}
"""


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "SIGKILL", "an exception"])
def test_a_server_ends_with_its_parent(how: str, place: Place):
    """The stand-in records that it was told to end, and its port is free again."""
    port = int(free_port())
    rest = "raise RuntimeError" if how == "an exception" else "time.sleep(60)"
    text = SERVE.format(folder=str(EXAMPLES / "eval"), port=port, rest=rest)
    # A shell starts what runs in the background without SIGINT; it is wanted here.
    text = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler){text}"
    with subprocess.Popen(
        [sys.executable, "-c", text],
        cwd=place.folder, env=place.env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as parent:  # fmt: skip
        while parent.stdout.readline() != b"up\n":
            assert parent.poll() is None
        if how != "an exception":
            parent.send_signal(getattr(signal, how))
        assert parent.wait(30) != 0
    for _ in range(200):
        if (place.folder / "asked.jsonl").exists():
            break
        time.sleep(0.1)
    (ended,) = place.asked()
    assert ended["arguments"]["served_model_name"].startswith("one-")
    time.sleep(0.1)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_taken_port_is_refused(pipeline: ModuleType, stand_in: StandIn):
    """A missing command is refused before anything starts."""
    stand_in.model = "left_alive"
    plan = pipeline.Plan([], {"port": stand_in.server_port}, None)
    said = f"port {stand_in.server_port} is taken: left_alive is served there."
    with pytest.raises(SystemExit, match=said), pipeline.served(plan, "no", "m", "left_alive", []):
        pass


def test_a_server_that_is_not_ours_is_refused(pipeline: ModuleType, tmp_path: Path):
    """It takes the port while our server loads, and uses our server's name for its model."""
    vllm = tmp_path / "vllm"
    vllm.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    vllm.chmod(0o755)
    port = int(free_port())
    plan = pipeline.Plan([], {"port": port}, None)
    said = []

    def serve() -> None:
        while not (tmp_path / "pid").exists():
            time.sleep(0.05)
        with StandIn(port, "one") as other:
            said.append(other)
            other.serve_forever()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with (
        pytest.raises(SystemExit, match=f"port {port} is taken: one is served there, and not one-"),
        pipeline.served(plan, str(vllm), "m", "one", []),
    ):
        pass
    said[0].shutdown()
    thread.join()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_an_adapter_is_refused(place: Place):
    (place.folder / "mistral" / "adapter_config.json").write_text("{}")
    said = place.here("generate", "--models", "mistral_dpo", code=1)
    assert "mistral_dpo: mistral has an adapter; merge it into a model." in said


@pytest.mark.parametrize("in_prompt, count", [(False, 0), (True, 2)])
def test_bos(in_prompt: bool, count: int, place: Place, pipeline: ModuleType):
    """Refused before a server is started: a tokenizer that adds no BOS, and one that adds a
    second."""
    plan = yaml.safe_load((place.folder / "models.yml").read_text())
    model = plan["models"][0 if count == 0 else 2]
    model["bos_in_prompt"] = in_prompt
    (place.folder / "models.yml").write_text(yaml.safe_dump(plan, sort_keys=False))
    said = place.here("generate", "--models", model["name"], code=1)
    assert f"a prompt has one BOS, got {count} from the tokenizer of {model['path']}; set " in said
    assert f"bos_in_prompt to {'true' if count == 0 else 'false'}" in said
    assert not (place.folder / "asked.jsonl").exists()


@pytest.mark.parametrize(
    "lc, chosen, said",
    [
        (
            {"other": (50.04, 50.0, 49.9)},
            "m-b",
            "m: learning rate 5e-07, LC 50.0 by the other judge",
        ),
        (
            {"other": (50.06, 50.0, 49.9)},
            "m-a",
            "m: learning rate 1e-06, LC 50.1 by the other judge",
        ),
        ({"other": (1, 2), "paper": (1, 2, 3)}, "m-c", "LC 3.0 by the paper judge, of 3 folders."),
        ({"other": (1, 2, 3), "paper": (3, 2, 1)}, "m-c", "by the other judge, of 3 folders."),
        ({"other": (1, 2)}, None, "m: not chosen, no judge has judged all of its 3 folders."),
        (None, None, "m: not chosen, no complete trainer_state.json in m-c."),
    ],
)
def test_the_learning_rate(lc, chosen: str | None, said: str, pipeline: ModuleType, plan):
    """The rule that the page states."""
    rates = {"m-a": 1e-6, "m-b": 5e-7, "m-c": 6e-7 if lc else None}
    models = [
        pipeline.Model(name, name, "FocalPO", "llama3", sweep="m", learning_rate=rate)
        for name, rate in rates.items()
    ]
    judged = {(key, name): {} for key in ("other", "paper") for name in rates}
    for key, values in (lc or {"other": (1, 2, 3)}).items():
        judged |= {(key, m): {"LC": (v, None)} for m, v in zip(rates, values, strict=False)}
    best, (why,) = pipeline.choose(pipeline.Plan(models, plan.file, plan.folder), judged)
    assert best == ({chosen} if chosen else set()) and said in why


def test_spread(pipeline: ModuleType):
    """The error of a mean is the standard deviation over the root of the number; 128 draws give it to about a
    sixteenth."""
    values = np.random.default_rng(0).normal(size=805)
    frame = pd.DataFrame({"x": values})
    error = pipeline.spread(lambda rows: rows["x"].mean(), frame, 128)
    assert error == pytest.approx(values.std(ddof=1) / math.sqrt(805), rel=0.2)


def test_each_row_has_its_own_questions_difficulty(
    pipeline: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Questions 0 to 3 have the difficulties 10, 20, 30 and 40. Judged are 3 and 1, in this order: 40
    and 20, and in each draw of the bootstrap as many of 40 as of the row that has 40."""
    from alpaca_eval.metrics import glm_winrate

    gamed = pd.DataFrame(
        {
            "model": "gamed",
            "preference": 0.5,
            "index": [0, 1, 2, 3] * 2,
            "std_delta_len": 0.5,
            "instruction_difficulty": [10.0, 20.0, 30.0, 40.0] * 2,
            "not_gamed_baseline": False,
        }
    )
    gamed.to_csv(tmp_path / "df_gamed.csv", index=False)
    monkeypatch.setattr(glm_winrate, "hf_hub_download", lambda **_: tmp_path / "df_gamed.csv")
    formula = glm_winrate.GLM_INFO["length_controlled_v1"]["formula"]

    def difficulties(rows: pd.DataFrame) -> list[float]:
        _, asked, _ = glm_winrate._get_featurized_data(rows, formula, 0.2)
        return asked["instruction_difficulty"].tolist()

    asked = pd.DataFrame({"instruction": ["a", "b", "c", "d", "b"]})
    of = {"preference": 1.4, "output_1": "x"}
    rows = [
        {**of, "instruction": "d", "output_2": "longer", "own": 40.0},
        {**of, "instruction": "b", "output_2": "long", "own": 20.0},
    ]
    frame = pipeline.numbered(rows, asked)
    assert frame.index.tolist() == [3, 1]
    assert difficulties(frame) == [40, 20]
    drawn = []

    def rate(rows: pd.DataFrame) -> float:
        assert difficulties(rows) == rows["own"].tolist()
        drawn.append(tuple(rows["own"]))
        return rows["own"].mean()

    pipeline.spread(rate, frame, 8)
    assert len(set(drawn)) > 2, "or nothing is told apart"


def test_one_draw_has_no_error(pipeline: ModuleType):
    error = pipeline.spread(lambda rows: 50.0, pd.DataFrame({"x": [1, 2]}), 1)
    assert math.isnan(error) and pipeline.show((50.0, error)) == "50.0"


def test_a_half_written_state_is_left_out(pipeline: ModuleType, plan, tmp_path: Path):
    """The rate comes from the complete one; without one it is unknown, and the message says so."""
    run = tmp_path / "sweep0001"
    for step, text in (
        (1, '{"log_history": [{"learning_rate": 5e-07}]}'),
        (2, '{"log_history": [{"le'),
    ):
        (run / f"checkpoint-{step}").mkdir(parents=True)
        (run / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    assert pipeline.learning_rate(run) == 5e-7
    shutil.rmtree(run / "checkpoint-1")
    assert pipeline.learning_rate(run) is None


def test_arena_hard_by_hand(pipeline: ModuleType, tmp_path: Path):
    """Question 1: B>>A and A>B, won 3 of 3 and 1 of 1; question 2: A=B and A>B, a half of 1 and 1 of 1.
    5.5 of 6 is 91.7; the rest of each, 4 - 11/12 * 4 and 1.5 - 11/12 * 2, is 1/3 and -1/3, so that the
    error is sqrt(2/9 * 2) / 6 = 11.1. Texts have all of Unicode's line breaks, the file begins with a
    byte order mark and ends in a blank line."""
    model = pipeline.Model("m", "x", "FocalPO", "llama3")
    file = tmp_path / "data" / pipeline.BENCH / "model_judgment" / "j" / "m.jsonl"
    file.parent.mkdir(parents=True)

    def row(question: str, score: str) -> str:
        text = "one\u2028two\u2029three\u0085four\x0cfive"
        games = [{"judgment": text, "score": score}, {"judgment": text, "score": "A>B"}]
        return json.dumps({"question_id": question, "games": games}, ensure_ascii=False) + "\n"

    text = "\ufeff" + row("1", "B>>A") + row("2", "A=B") + "\n"
    file.write_text(text, encoding="utf-8")
    (value,) = pipeline.arena_hard_rate(tmp_path, "j", model).values()
    assert pipeline.show(value) == "91.7 ± 11.1"
    file.write_text(text.rstrip() + '\n{"question_id": "3", "ga', encoding="utf-8")
    with pytest.raises(SystemExit, match=r"m.jsonl, line 3, is not JSON: .* Remove that line"):
        pipeline.arena_hard_rate(tmp_path, "j", model)


def test_half_written_results(pipeline: ModuleType, tmp_path: Path):
    """lm-eval's newest is left out, and asked for again if there is no other; what judge and generate
    would build on ends them with the file's name."""
    model = pipeline.Model("m", "x", "FocalPO", "llama3")
    folder = tmp_path / "lm_eval" / "m"
    folder.mkdir(parents=True)
    (folder / "results_2.json").write_text('{"results": {"hella')
    assert pipeline.lm_eval_results(tmp_path, model) == []
    (folder / "results_1.json").write_text('{"results": {"mmlu": {"acc,none": 0.5}}}')
    assert pipeline.lm_eval_results(tmp_path, model) == [{"mmlu": {"acc,none": 0.5}}]
    answers = pipeline.answers_file(tmp_path, "simpo", model)
    args = argparse.Namespace(out=tmp_path, decoding="simpo", judge="other")
    (answers.parent / "other").mkdir(parents=True)
    answers.write_text('[{"instruction": "a", "output": "b"}]')
    assert pipeline.to_judge(args, model)
    for broken in (answers.parent / "other" / "judgments.json", answers):
        broken.write_text('[{"instruction": "a", "outp')
        with pytest.raises(SystemExit, match=f"{broken.name} isn't a complete list of rows"):
            pipeline.to_judge(args, model)
    (answers.parent / "other" / "leaderboard.csv").write_text(",win_rate\n")
    with pytest.raises(SystemExit, match="leaderboard.csv isn't a complete result of judge"):
        pipeline.alpaca_eval_rates(tmp_path, "simpo", "other", model)


def test_table_2_by_hand(pipeline: ModuleType, plan, tmp_path: Path):
    """Columns in acc, the average in acc_norm where there is one, the errors' squares added; the newest
    of two runs."""
    (model,) = [m for m in plan.models if m.name == "llama3_focalpo"]
    both = {
        "acc,none": 0.5,
        "acc_stderr,none": 0.03,
        "acc_norm,none": 0.8,
        "acc_norm_stderr,none": 0.04,
    }
    results = {
        "hellaswag": both,
        "arc_challenge": both | {"acc_norm,none": 0.7},
        "truthfulqa_mc2": {"acc,none": 0.6, "acc_stderr,none": 0.03},
        "winogrande": {"acc,none": 0.7, "acc_stderr,none": 0.03},
        "gsm8k": {"exact_match,strict-match": 0.4, "exact_match_stderr,strict-match": 0.03},
        "mmlu": {"acc,none": 0.3, "acc_stderr,none": 0.03},
    }
    folder = tmp_path / "lm_eval" / model.name / "outputs__x"
    folder.mkdir(parents=True)
    for second, found in enumerate([{"hellaswag": both}, results]):
        path = folder / f"results_{'ba'[second]}.json"
        path.write_text(json.dumps({"results": found}))
        os.utime(path, (second, second))
    rates = pipeline.lm_eval_rates(tmp_path, model)
    shown = {column: pipeline.show(value) for column, value in rates.items()}
    assert shown == {
        "HellaSwag": "50.0 ± 3.0",
        "ARC": "50.0 ± 3.0",
        "TruthfulQA": "60.0 ± 3.0",
        "WinoGrande": "70.0 ± 3.0",
        "GSM8K": "40.0 ± 3.0",
        "MMLU": "30.0 ± 3.0",
        "mean of the six": "50.0 ± 1.2",  # sqrt(6 * 9) / 6
        "average": "58.3 ± 1.4",  # (80 + 70 + 60 + 70 + 40 + 30) / 6, sqrt(2 * 16 + 4 * 9) / 6
    }


def test_the_papers_rows(pipeline: ModuleType, plan):
    """RESULTS.md has ten rows in Table 1 and twelve in Table 2. models.yml lists two models for each
    row, a public one and the user's own, and for SFT only the public one. It also lists the
    authors' two."""
    tables = pipeline.printed(EXAMPLES / "RESULTS.md")
    assert [len(each.rows) for each in tables] == [5, 5, 6, 6]
    for each in tables:
        for method in each.rows:
            of = [
                m
                for m in plan.models
                if (m.method, plan.form(m)["family"]) == (method, each.family)
            ]
            public = [m for m in of if not m.path.startswith("outputs/")]
            assert len(public) == 1, (each.family, method)
            assert len(of) == (1 if method == "SFT" else 2)
    ids = {model.path for model in plan.models}
    assert {
        "tongliuphysics/Llama-3-8B-Instruct-FocalPO",
        "tongliuphysics/Mistral-7B-Base-SFT-FocalPO",
    } <= ids


def test_yours_are_where_the_recipes_put_them(plan):
    """A path under outputs/ is the output_dir of a recipe."""
    folders = set()
    for path in [*EXAMPLES.glob("*.yml"), *EXAMPLES.glob("baselines/*.yml")]:
        folders.add(Path(yaml.safe_load(path.read_text())["output_dir"]).as_posix())
    yours = [model.path for model in plan.models if model.path.startswith("outputs/")]
    assert len(yours) == 10 and set(yours) <= folders
