"""From the models of models.yml to the tables of ../RESULTS.md with your numbers in them.

    python examples/eval/pipeline.py configs   # writes what AlpacaEval, Arena-Hard and lm-eval read
    python examples/eval/pipeline.py generate  # answers, and the leaderboard's tasks
    python examples/eval/pipeline.py judge     # judgments of the answers
    python examples/eval/pipeline.py table     # prints the tables
    python examples/eval/pipeline.py answers   # prints the answers to one question

README.md in this folder lists what has to be installed.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import importlib.util
import json
import math
import os
import re
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from glob import glob
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]
from children import child  # noqa: E402

BENCHMARKS = ("alpaca_eval", "arena_hard", "lm_eval")
BENCH = "arena-hard-v0.1"
BASELINE = "gpt-4-0314"
# The paper's columns of Table 2: lm-eval's name, its metric, and the one that the average is over.
TASKS = {
    "HellaSwag": ("hellaswag", "acc,none", "acc_norm,none"),
    "ARC": ("arc_challenge", "acc,none", "acc_norm,none"),
    "TruthfulQA": ("truthfulqa_mc2", "acc,none", "acc,none"),
    "WinoGrande": ("winogrande", "acc,none", "acc,none"),
    "GSM8K": ("gsm8k", "exact_match,strict-match", "exact_match,strict-match"),
    "MMLU": ("mmlu", "acc,none", "acc,none"),
}
KEYS = ("models", "formats", "decodings", "judges", "port", "serve", "lm_eval")  # of models.yml
# The question of the paper's Tables 3 and 4.
QUESTION = "How long will it take to walk around the world"
HEADER = "# Written by pipeline.py from models.yml: change that file.\n"


@dataclass(frozen=True)
class Model:
    """One row: a folder or an id of the hub, and how it is asked."""

    name: str
    path: str
    method: str
    format: str
    empty_system: bool = False
    bos_in_prompt: bool = False
    sweep: str | None = None
    learning_rate: float | None = None

    @property
    def is_here(self) -> bool:
        """An id of the hub, which is owner/name, or a folder with a model in it."""
        of_hub = self.path.count("/") == 1 and not self.path.startswith((".", "outputs/"))
        return (Path(self.path) / "config.json").is_file() if Path(self.path).is_dir() else of_hub


@dataclass(frozen=True)
class Plan:
    """models.yml."""

    models: list[Model]
    file: dict[str, Any]
    folder: Path
    mark: str = field(default_factory=lambda: secrets.token_hex(4))

    def served_name(self, name: str) -> str:
        """The name under which a server of this run serves a model: no other server has it."""
        return f"{name}-{self.mark}" if self.mark else name

    def form(self, model: Model) -> dict[str, Any]:
        found: dict[str, Any] = self.file["formats"][model.format]
        return found

    def decoding(self, name: str, model: Model) -> dict[str, Any]:
        of = self.file["decodings"][name]
        found: dict[str, Any] = of.get(model.format) or of["all"]
        return found

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.file['port']}/v1"


def load(path: Path) -> Plan:
    """Reads models.yml; a path with a * becomes a model for each folder that it finds."""
    try:
        file = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SystemExit(
            f"--file is a YAML such as models.yml, got {path}: {one_line(error)}."
        ) from None
    missing = [key for key in KEYS if not isinstance(file, dict) or key not in file]
    if missing:
        raise SystemExit(f"--file is a YAML such as models.yml, got {path} without {missing[0]}.")
    if not isinstance(file["port"], int) or not 0 < file["port"] < 2**16:
        raise SystemExit(f"port is a number from 1 to 65535, got {file['port']!r} in {path}.")
    models = []
    for entry in file["models"]:
        try:
            model = Model(**entry)
        except TypeError as error:
            raise SystemExit(f"{path}: a model has other keys than it can: {error}.") from None
        if model.format not in file["formats"]:
            formats = ", ".join(file["formats"])
            raise SystemExit(f"{model.name}: format is one of {formats}, got {model.format}.")
        if "*" not in model.path:
            models.append(model)
            continue
        for folder in sorted(glob(model.path)):
            name = f"{model.name}-{Path(folder).name}"
            rate = learning_rate(Path(folder))
            own = {**entry, "name": name, "path": folder, "sweep": model.name}
            models.append(Model(**own, learning_rate=rate))
    names = [model.name for model in models]
    for name in names:
        if names.count(name) > 1 or not re.fullmatch(r"[\w.-]+", name):
            raise SystemExit(f"name: letters, digits and ._- , each name once, got {name}.")
    return Plan(models, file, path.resolve().parent)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")


def whole(path: Path) -> Any:
    """The content of a JSON file; None if it ends early, as when its run was killed."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError:
        return None


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON file written by this script or by alpaca_eval."""
    rows = whole(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise SystemExit(f"{path} isn't a complete list of rows. Delete it to have it made again.")
    return rows


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; a text in them may have line breaks other than \\n."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise SystemExit(
                    f"{path}, line {number}, is not JSON: {error}. Remove that line."
                ) from None
    return rows


def learning_rate(folder: Path) -> float | None:
    """The highest that a run logged, which is the one that it was given.

    A state that was being saved when its run was killed is left out.
    """
    states = [*folder.glob("trainer_state.json"), *folder.glob("checkpoint-*/trainer_state.json")]
    rates = [
        entry["learning_rate"]
        for state in states
        for entry in (whole(state) or {}).get("log_history", [])
        if "learning_rate" in entry
    ]
    return max(rates, default=None)


# --- the prompts --------------------------------------------------------------------------------


def prompt(plan: Plan, model: Model) -> str:
    """AlpacaEval's template: the prompt of training, with the BOS where no tokenizer adds it."""
    before, between, after = plan.form(model)["turn"]
    system = f"{before}system{between}{after}" if model.empty_system else ""
    user = f"{before}user{between}{{instruction}}{after}"
    bos = plan.form(model)["bos"] if model.bos_in_prompt else ""
    return f"{bos}{system}{user}{before}assistant{between}"


def chat_template(plan: Plan, model: Model) -> str:
    """The same for vLLM's chat endpoint, which adds no BOS by itself."""
    form = plan.form(model)
    before, between, after = form["turn"]
    empty = repr(f"{before}system{between}{after}")
    text = "message['content'] | trim" if form.get("trim") else "message['content']"
    system = (
        f"{{% if messages[0]['role'] != 'system' %}}{{{{ {empty} }}}}{{% endif %}}"
        if model.empty_system
        else ""
    )
    turn = f"{before!r} + message['role'] + {between!r} + {text} + {after!r}"
    return (
        f"{{{{ bos_token }}}}{system}"
        f"{{% for message in messages %}}{{{{ {turn} }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {f'{before}assistant{between}'!r} }}}}{{% endif %}}"
    )


def check_bos(plan: Plan, model: Model) -> None:
    """The model's own tokenizer has to make exactly one BOS of the prompt."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.path)
    ids = tokenizer(prompt(plan, model))["input_ids"]
    count = ids.count(tokenizer.bos_token_id)
    if count != 1:
        wanted = "true" if count == 0 else "false"
        raise SystemExit(
            f"{model.name}: a prompt has one BOS, got {count} from the tokenizer of {model.path}; "
            f"set bos_in_prompt to {wanted} in models.yml."
        )


# --- configs ------------------------------------------------------------------------------------


def write(path: Path, content: Any, note: str = "") -> None:
    """Write text as it is, and anything else as YAML with a note on its source."""
    text = content
    if not isinstance(content, str):
        text = HEADER + (f"# {note}\n" if note else "") + yaml.safe_dump(content, sort_keys=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def configs(plan: Plan, out: Path) -> Path:
    """Writes what the three frameworks read, for all models, decodings and judges."""
    folder = (out / "configs").resolve()
    endpoints = {}
    for model in plan.models:
        for name in plan.file["decodings"]:
            alpaca_eval_configs(plan, model, name, folder / "alpaca_eval" / name / model.name)
        arena = folder / "arena_hard" / model.name
        write(arena / "chat_template.jinja", chat_template(plan, model))
        answers = {"temperature": 0.0, "max_tokens": 4096, "num_choices": 1}
        this = {"bench_name": BENCH, **answers, "model_list": [model.name]}
        write(arena / "gen_answer_config.yaml", {"name": f"{BENCH} {model.name}", **this})
        for key, judge in plan.file["judges"].items():
            write(arena / f"judge_{key}.yaml", arena_judge(model, judge), judge["note"])
        endpoints[model.name] = endpoint(plan.served_name(model.name), plan.url)
        write(folder / "lm_eval" / f"{model.name}.yml", lm_eval_config(plan, model, out))
    for key, judge in plan.file["judges"].items():
        endpoints[judge["name"]] = (
            endpoint(plan.served_name(judge["name"]), plan.url)
            if "serve" in judge
            else endpoint(judge["name"], None)
        )
        config = folder / "alpaca_eval" / "judges" / key / "configs.yaml"
        write(config, alpaca_judge(plan, judge), judge["note"])
    write(folder / "arena_hard" / "api_config.yaml", endpoints)
    return folder


def alpaca_eval_configs(plan: Plan, model: Model, decoding: str, folder: Path) -> None:
    """served.yaml, through a vLLM server, and configs.yaml, with an old vLLM inside alpaca_eval."""
    sampling = plan.decoding(decoding, model)
    stop = plan.form(model).get("stop_token_ids")
    stops = {"stop_token_ids": stop} if stop else {}
    write(folder / "prompt.txt", prompt(plan, model))
    served = {
        "model_name": plan.served_name(model.name),
        "requires_chatml": False,  # the completions endpoint, with our prompt
        "is_strip": False,  # alpaca_eval would cut the line breaks that end the prompt
        **sampling,
        "extra_body": {**stops, "add_special_tokens": True},
        "batch_size": 16,
        "num_procs": 4,
        "price_per_token": 0,
        "client_kwargs": {"base_url": plan.url},
    }
    local = {
        "model_name": model.path,
        "model_kwargs": {"tp": 1},  # 0.6.2 fails without model_kwargs
        "max_new_tokens": sampling["max_tokens"],
        "temperature": sampling["temperature"],
        "top_p": sampling["top_p"],
        "do_sample": sampling["temperature"] > 0,
        **stops,
        "batch_size": 900,
    }
    for file, function, kwargs in (
        ("served.yaml", "openai_completions", served),
        ("configs.yaml", "vllm_local_completions", local),
    ):
        entry = {
            "prompt_template": str(folder / "prompt.txt"),
            "fn_completions": function,
            "completions_kwargs": kwargs,
            "pretty_name": model.name,
        }
        write(folder / file, {model.name: entry})


def alpaca_judge(plan: Plan, judge: dict[str, Any]) -> dict[str, Any]:
    """weighted_alpaca_eval_gpt4_turbo with another judge: its prompt, tokens and parser."""
    spec = importlib.util.find_spec("alpaca_eval")
    if spec is None or spec.origin is None:
        raise SystemExit("alpaca_eval isn't installed here; README.md has the command.")
    prompts = Path(spec.origin).parent / "evaluators_configs" / "alpaca_eval_clf_gpt4_turbo"
    kwargs: dict[str, Any] = {
        "model_name": judge["name"],
        "max_tokens": 1,
        "temperature": 1,  # the probabilities are read, not the token that was drawn
        "logprobs": True,
        "top_logprobs": judge["top_logprobs"],
        "requires_chatml": True,
    }
    if "serve" in judge:
        kwargs |= {"price_per_token": 0, "client_kwargs": {"base_url": plan.url}}
        kwargs["model_name"] = plan.served_name(judge["name"])
    entry = {
        "prompt_template": str(prompts / "alpaca_eval_clf.txt"),
        "fn_completions": "openai_completions",
        "completions_kwargs": kwargs,
        "fn_completion_parser": "logprob_parser",
        "completion_parser_kwargs": {
            "numerator_token": "m",
            "denominator_tokens": ["m", "M"],
            "is_binarize": False,
        },
        "completion_key": "completions_all",
        "batch_size": 1,
    }
    return {f"weighted_alpaca_eval_{judge['name']}": entry}


def arena_judge(model: Model, judge: dict[str, Any]) -> dict[str, Any]:
    """Arena-Hard's judge; its prompts come from the checkout."""
    return {
        "name": f"{BENCH} {model.name}",
        "bench_name": BENCH,
        "judge_model": judge["name"],
        "reference": False,
        "ref_model": None,
        "baseline": True,
        "baseline_model": BASELINE,
        "pairwise": True,  # both orders
        "temperature": 0,
        "max_tokens": 4096,
        "number_of_judgment_attempts": 2,
        "regex_pattern": r"\[\[([AB<>=]+)\]\]",
        "model_list": [model.name],
    }


def endpoint(name: str, url: str | None) -> dict[str, Any]:
    """The server that Arena-Hard asks for a model; without an address, OpenAI's."""
    places = None if url is None else [{"api_base": url, "api_key": "unused"}]
    parallel = 8 if url is None else 32
    return {"model_name": name, "endpoints": places, "api_type": "openai", "parallel": parallel}


def lm_eval_config(plan: Plan, model: Model, out: Path) -> dict[str, Any]:
    """A run file: plain text as on the leaderboard, without chat template and system prompt."""
    own = plan.file["lm_eval"]
    bos = {"add_bos_token": True} if model.bos_in_prompt else {}
    return {
        "model": "hf",
        "model_args": {"pretrained": model.path, "dtype": own["dtype"], **bos},
        "include_path": [str(plan.folder / path) for path in own["include_path"]],
        "tasks": ["focalpo_table2"],
        "apply_chat_template": False,
        "fewshot_as_multiturn": False,
        "system_instruction": None,
        "batch_size": own["batch_size"],
        "device": own["device"],
        "seed": [0, 1234, 1234, 1234],  # lm-eval's defaults, written down
        "output_path": str(out.resolve() / "lm_eval" / model.name),
        "log_samples": True,
    }


# --- generate -----------------------------------------------------------------------------------


@contextlib.contextmanager
def served(plan: Plan, vllm: str, path: str, name: str, options: Sequence[str]) -> Iterator[None]:
    """A vLLM server, from the moment that it answers; it ends with the block, or with this process.

    A server that another run left alive would answer instead, with another model's weights.
    """
    port = plan.file["port"]
    with socket.socket() as probe:
        taken = probe.connect_ex(("127.0.0.1", port)) == 0
    if taken:
        raise SystemExit(
            f"port {port} is taken: {', '.join(names(plan) or ['something'])} is served there. End "
            "that server, or change the port in models.yml."
        )
    own = plan.served_name(name)
    command = [vllm, "serve", path, "--served-model-name", own, "--port", str(port), *options]
    print("+", *command, flush=True)
    with child(command) as process:
        while True:
            if process.poll() is not None:
                raise SystemExit(f"vLLM ended with {process.returncode} before it served {name}.")
            found = names(plan)
            if found is not None and own in found:
                break
            if found is not None:
                shown = ", ".join(found)
                raise SystemExit(f"port {port} is taken: {shown} is served there, and not {own}.")
            time.sleep(1)
        yield


def names(plan: Plan) -> list[str] | None:
    """The names of the models of a server on the port; None if no server answers."""
    try:
        with urllib.request.urlopen(f"{plan.url}/models", timeout=10) as answer:
            return [str(entry["id"]) for entry in json.load(answer)["data"]]
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        return None


def questions(data: str | None) -> Any:
    """AlpacaEval's questions with the reference's answers, as a data frame."""
    from alpaca_eval import constants, utils

    if data is None:
        return utils.load_or_convert_to_dataframe(constants.ALPACAEVAL_REFERENCE_OUTPUTS)
    try:
        found = utils.load_or_convert_to_dataframe(data)
        found[["instruction", "output"]]
    except Exception as error:  # of pandas, by the file's form
        raise SystemExit(
            "--alpaca-data is a file with instruction and output in each row, got "
            f"{data}: {one_line(error)}."
        ) from None
    return found


def alpaca_eval_answers(config: Path, file: Path, asked: Any) -> None:
    """Adds the answers to the questions that have none, by alpaca_eval's own client."""
    import pandas as pd
    from alpaca_eval import decoders, utils

    ((name, entry),) = utils.load_configs(config).items()
    prompts, rows = utils.make_prompts(
        asked, template=Path(entry["prompt_template"]).read_text("utf-8")
    )
    function = decoders.get_fn_completions(entry["fn_completions"])
    texts = function(prompts=prompts, **entry["completions_kwargs"])["completions"]
    kept = rows[["dataset", "instruction"]].assign(
        output=[text.strip() for text in texts], generator=name
    )
    before = [pd.DataFrame(rows_of(file))] if file.exists() else []
    file.parent.mkdir(parents=True, exist_ok=True)
    # Completely or not at all: it holds the earlier answers.
    half = file.with_suffix(".part")
    pd.concat([*before, kept]).to_json(half, orient="records", indent=2)
    half.replace(file)


def answers_file(out: Path, decoding: str, model: Model) -> Path:
    return out / "alpaca_eval" / decoding / model.name / "model_outputs.json"


def run(command: Sequence[str], folder: Path | None = None) -> None:
    print("+", *command, flush=True)
    code = subprocess.run(command, cwd=folder).returncode
    if code:
        raise SystemExit(f"{' '.join(command)} ended with {code}; its output is above.")


def arena_hard(script: str, setting: Path, folder: Path, args: argparse.Namespace) -> None:
    """One of Arena-Hard's scripts, which look for data/ where they are started."""
    api = setting.parents[1] / "api_config.yaml"
    command = [args.arena_python, script, "--setting-file", str(setting)]
    run([*command, "--endpoint-file", str(api)], folder)


def checkout(args: argparse.Namespace) -> Path:
    folder = Path(args.arena_hard).resolve()
    if not (folder / "gen_judgment.py").is_file():
        raise SystemExit(f"--arena-hard is a checkout of Arena-Hard-Auto, got {folder}; README.md.")
    data = folder / "data" / BENCH
    for path in (data / "question.jsonl", data / "model_answer" / f"{BASELINE}.jsonl"):
        if not path.is_file():
            raise SystemExit(
                f"--arena-hard has its data in data/{BENCH}, got no {path}; README.md."
            )
    executable(args.arena_python, "--arena-python")
    return folder


def executable(command: str, option: str) -> str:
    """The command, if it is there."""
    if shutil.which(command) is None:
        raise SystemExit(f"{option} is a command, got {command}, which isn't there.")
    return command


def generate(plan: Plan, args: argparse.Namespace) -> None:
    """What needs the models: answers for the two judged benchmarks, and lm-eval's tasks."""
    os.environ.setdefault("OPENAI_API_KEY", "unused")  # alpaca_eval's client wants one
    arena = checkout(args) if "arena_hard" in args.benchmarks else None
    asked = questions(args.alpaca_data) if "alpaca_eval" in args.benchmarks else None
    if asked is not None and args.question:
        asked = asked[asked["instruction"].str.contains(args.question, regex=False)]
        if asked.empty:
            raise SystemExit(
                f"--question is part of a question of AlpacaEval, got {args.question}."
            )
    models = chosen(plan, args)
    if args.in_process and (len(models) > 1 or [*args.benchmarks] != ["alpaca_eval"]):
        raise SystemExit("--in-process takes --models with one name and --benchmarks alpaca_eval.")
    if "lm_eval" in args.benchmarks and importlib.util.find_spec("lm_eval") is None:
        raise SystemExit("lm_eval isn't installed here; README.md has the command.")
    left = {model.name: unanswered(args, model, asked) for model in models}
    to_serve = [model for model in models if left[model.name] is not None or arena is not None]
    if to_serve and not args.in_process:
        executable(args.vllm, "--vllm")
    for model in to_serve:
        check_bos(plan, model)
    folder = configs(plan, args.out)
    for model in models:
        if model in to_serve:
            answer(plan, args, model, folder, left[model.name], arena)
        if "lm_eval" in args.benchmarks and not lm_eval_results(args.out, model):
            tasks = folder / "lm_eval" / f"{model.name}.yml"
            run([sys.executable, "-m", "lm_eval", "run", "--config", str(tasks)])


def unanswered(args: argparse.Namespace, model: Model, asked: Any) -> Any:
    """The questions that have no answer yet; None if there are none."""
    file = answers_file(args.out, args.decoding, model)
    done = [row["instruction"] for row in rows_of(file)] if file.exists() else []
    left = None if asked is None else asked[~asked["instruction"].isin(done)]
    return None if left is None or left.empty else left


def answer(
    plan: Plan, args: argparse.Namespace, model: Model, folder: Path, left: Any, arena: Path | None
) -> None:
    """Serves a model, and asks it the questions that it has not answered."""
    template = folder / "arena_hard" / model.name / "chat_template.jinja"
    options = [*plan.file["serve"], "--chat-template", str(template)]
    server: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if not args.in_process:
        server = served(plan, args.vllm, model.path, model.name, options)
    with server:
        if left is not None:
            config = "configs.yaml" if args.in_process else "served.yaml"
            of_model = folder / "alpaca_eval" / args.decoding / model.name
            file = answers_file(args.out, args.decoding, model)
            alpaca_eval_answers(of_model / config, file, left)
        if arena is not None:
            setting = folder / "arena_hard" / model.name / "gen_answer_config.yaml"
            arena_hard("gen_answer.py", setting, arena, args)


def chosen(plan: Plan, args: argparse.Namespace) -> list[Model]:
    """The named models, or all that exist."""
    if args.models:
        known = {model.name: model for model in plan.models}
        for name in args.models:
            if name not in known:
                raise SystemExit(f"--models: {', '.join(known)}; got {name}.")
            if not known[name].is_here:
                raise SystemExit(f"{name}: no model in {known[name].path}.")
        found = [known[name] for name in args.models]
    else:
        for model in plan.models:
            if not model.is_here:
                print(f"{model.name}: left out, no model in {model.path}", flush=True)
        found = [model for model in plan.models if model.is_here]
    for model in found:
        # Its other weights would be random, without any error.
        if (Path(model.path) / "adapter_config.json").exists():
            raise SystemExit(f"{model.name}: {model.path} has an adapter; merge it into a model.")
    return found


# --- judge --------------------------------------------------------------------------------------


def judge(plan: Plan, args: argparse.Namespace) -> None:
    """Judges the answers that exist."""
    entry = plan.file["judges"][args.judge]
    if "serve" in entry:
        os.environ.setdefault("OPENAI_API_KEY", "unused")  # alpaca_eval's client wants one
    elif not os.environ.get("OPENAI_API_KEY"):
        raise SystemExit(f"OPENAI_API_KEY isn't set, which {entry['model']} is asked with.")
    arena, prompts = None, {}
    if "arena_hard" in args.benchmarks:
        arena = checkout(args)
        prompts = judge_prompts(arena / "config" / "judge_config.yaml")
    models = chosen(plan, args)
    asked = questions(args.alpaca_data) if "alpaca_eval" in args.benchmarks else None
    of_alpaca = [] if asked is None else [model for model in models if to_judge(args, model)]
    of_arena = [model for model in models if arena and arena_answers(arena, model).exists()]
    if not of_alpaca and not of_arena:
        print("nothing to judge: all answers have been judged", flush=True)
        return
    server: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if "serve" in entry:
        vllm = executable(args.vllm, "--vllm")
        server = served(plan, vllm, entry["model"], entry["name"], entry["serve"])
    folder = configs(plan, args.out)
    with server:
        for model in models:
            if model in of_alpaca:
                config = folder / "alpaca_eval" / "judges" / args.judge
                alpaca_eval_judgments(config, model, asked, args)
            if arena is not None and model in of_arena:
                setting = folder / "arena_hard" / model.name / f"judge_{args.judge}.yaml"
                own = yaml.safe_load(setting.read_text("utf-8"))
                write(setting, own | prompts, entry["note"])
                arena_hard("gen_judgment.py", setting, arena, args)


def judge_prompts(path: Path) -> dict[str, Any]:
    """Those of Arena-Hard's own judge."""
    try:
        shared = yaml.safe_load(path.read_text("utf-8"))
        return {key: shared[key] for key in ("system_prompt", "prompt_template")}
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise SystemExit(f"{path} has no prompts of a judge: {one_line(error)}.") from None


def results_folder(args: argparse.Namespace, model: Model) -> Path:
    return answers_file(args.out, args.decoding, model).parent / args.judge


def to_judge(args: argparse.Namespace, model: Model) -> bool:
    """Whether AlpacaEval's answers are there, and newer than their judgments."""
    answers = answers_file(args.out, args.decoding, model)
    if not answers.exists():
        return False
    rows_of(answers)
    results = results_folder(args, model)
    judged, board = results / "judgments.json", results / "leaderboard.csv"
    if judged.exists():
        rows_of(judged)
    return not board.exists() or board.stat().st_mtime <= answers.stat().st_mtime


def spread(rate: Callable[[Any], float], frame: Any, draws: int) -> float:
    """The bootstrap's standard error: over draws of as many rows, with replacement.

    A row keeps its index, by which ``rate`` may know it. One draw has no error.
    """
    drawn = [rate(frame.sample(frac=1, replace=True, random_state=seed)) for seed in range(draws)]
    return statistics.stdev(drawn) if draws > 1 else math.nan


def numbered(annotations: Any, asked: Any) -> Any:
    """The annotated rows, with the number of each one's question among all as their index.

    alpaca_eval looks a question's difficulty up by this number. It counts the rows instead, which
    is the same only if no question is missing.
    """
    import pandas as pd

    numbers = {text: number for number, text in reversed([*enumerate(asked["instruction"])])}
    frame = pd.DataFrame(annotations)
    frame.index = pd.Index([numbers[text] for text in frame["instruction"]])
    return frame


def alpaca_eval_judgments(config: Path, model: Model, asked: Any, args: argparse.Namespace) -> None:
    """A model's leaderboard.csv, with an error of the length-controlled rate, and annotations."""
    results = results_folder(args, model)
    results.mkdir(exist_ok=True)
    from alpaca_eval import evaluate, metrics

    def controlled(rows: Any) -> dict[str, float]:
        found: dict[str, float] = metrics.get_length_controlled_winrate(
            rows, save_weights_dir=None, is_add_glm_preference_inplace=False
        )
        return found

    def rates(annotations: Any) -> dict[str, float]:
        frame = numbered(annotations, asked)
        error = spread(
            lambda rows: controlled(rows)["length_controlled_winrate"], frame, args.resamples
        )
        return {**controlled(frame), "lc_standard_error": error}

    evaluate(
        model_outputs=str(answers_file(args.out, args.decoding, model)),
        reference_outputs=asked,
        annotators_config=str(config),
        name=model.name,
        output_path=str(results),
        precomputed_leaderboard=None,
        caching_path=str(results / "judgments.json"),  # to continue after a stop
        fn_metric=rates,
    )


def arena_answers(arena: Path, model: Model) -> Path:
    return arena / "data" / BENCH / "model_answer" / f"{model.name}.jsonl"


# --- table --------------------------------------------------------------------------------------

Value = tuple[float, float | None]  # in percent, with its standard error


def show(value: Value | None) -> str:
    if value is None:
        return ""
    rate, error = value
    return f"{rate:.1f}" if error is None or math.isnan(error) else f"{rate:.1f} ± {error:.1f}"


def alpaca_eval_rates(out: Path, decoding: str, judge: str, model: Model) -> dict[str, Value]:
    """WR and LC."""
    file = answers_file(out, decoding, model).parent / judge / "leaderboard.csv"
    if not file.exists():
        return {}
    import pandas as pd

    try:
        row = pd.read_csv(file, index_col=0).loc[model.name]
        return {
            "WR": (row["win_rate"], row["standard_error"]),
            "LC": (row["length_controlled_winrate"], row["lc_standard_error"]),
            "questions": (row["n_total"], None),
        }
    except (KeyError, ValueError) as error:
        raise SystemExit(
            f"{file} isn't a complete result of judge: {one_line(error)}. Delete it, and judge "
            "again."
        ) from None


def arena_hard_rate(arena: Path, judge: str, model: Model) -> dict[str, Value]:
    """The share of the weight that the model wins, a tie being half a win, as in show_result.py.

    A verdict >> weighs 3. The error is that of a ratio of two sums over questions.
    """
    file = arena / "data" / BENCH / "model_judgment" / judge / f"{model.name}.jsonl"
    if not file.exists():
        return {}
    rows = {}
    for row in lines_of(file):
        won = weight = 0.0
        # The baseline is A in the first game and B in the second.
        for game, ours in zip(row["games"], "BA", strict=True):
            verdict = game["score"]
            if verdict not in ("A>>B", "A>B", "A=B", "B>A", "B>>A"):
                continue
            counts = 3 if ">>" in verdict else 1
            weight += counts
            won += counts * (0.5 if verdict == "A=B" else verdict.startswith(ours))
        rows[row["question_id"]] = (won, weight)
    total = sum(weight for _, weight in rows.values())
    if not total:
        return {}
    rate = sum(won for won, _ in rows.values()) / total
    n = len(rows)
    if n < 2:
        return {"Arena-Hard": (100 * rate, None)}
    squares = sum((won - rate * weight) ** 2 for won, weight in rows.values())
    return {"Arena-Hard": (100 * rate, 100 * math.sqrt(squares * n / (n - 1)) / total)}


def lm_eval_results(out: Path, model: Model) -> list[dict[str, Any]]:
    """What each run found, the newest last; a file that ends early is left out."""
    files = (out / "lm_eval" / model.name).rglob("results_*.json")
    contents = map(whole, sorted(files, key=lambda path: path.stat().st_mtime))
    return [content["results"] for content in contents if content]


def lm_eval_rates(out: Path, model: Model) -> dict[str, Value]:
    """The columns of Table 2; the average is over acc_norm where a task has it, as in LION."""
    runs = lm_eval_results(out, model)
    if not runs:
        return {}
    results = runs[-1]

    def value(task: str, metric: str) -> Value:
        name, _, filtered = metric.partition(",")
        error = results[task].get(f"{name}_stderr,{filtered}")
        known = isinstance(error, float)
        return 100 * results[task][metric], 100 * error if known else None

    def mean(values: list[Value]) -> Value:
        errors = [error for _, error in values if error is not None]
        rate = sum(rate for rate, _ in values) / len(values)
        whole = len(errors) == len(values)
        return rate, math.hypot(*errors) / len(values) if whole else None

    rates = {column: value(task, metric) for column, (task, metric, _) in TASKS.items()}
    averaged = [value(task, metric) for task, _, metric in TASKS.values()]
    return {**rates, "mean of the six": mean(list(rates.values())), "average": mean(averaged)}


@dataclass(frozen=True)
class Printed:
    """A table of ../RESULTS.md: what stands above it, its columns of numbers, and its rows."""

    family: str
    columns: list[str]
    rows: dict[str, dict[str, str]]


def printed(path: Path) -> list[Printed]:
    """The paper's tables that have columns for your numbers."""
    found: list[Printed] = []
    above = ""
    for block in path.read_text("utf-8-sig").split("\n\n"):
        lines = block.strip().split("\n") if block.strip() else []
        if not lines or not lines[0].startswith("| method |"):
            above = lines[-1] if lines else above
            continue
        head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        if "yours" not in head:
            continue
        columns = [name for name in head[1:] if name != "yours"]
        numbers = {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}
        found.append(Printed(above.strip().rstrip(":"), columns, numbers))
    return found


def table(plan: Plan, args: argparse.Namespace) -> str:
    """The tables, a row for each model, and the learning rate that each sweep comes to."""
    arena = Path(args.arena_hard)
    judges = plan.file["judges"]
    judged = {
        (key, model.name): {
            **alpaca_eval_rates(args.out, args.decoding, key, model),
            **arena_hard_rate(arena, judges[key]["name"], model),
        }
        for key in judges
        for model in plan.models
    }
    best, why = choose(plan, judged)
    most = max(
        (rates["questions"][0] for rates in judged.values() if "questions" in rates), default=0
    )
    for (key, name), rates in judged.items():
        if "questions" in rates and rates["questions"][0] < most:
            count = f"{rates['questions'][0]:.0f} of {most:.0f}"
            why.append(f"{name}: WR and LC by the {key} judge are over {count} questions.")
    ours = {
        key: "yours" if key == "paper" else f"{key} judge"
        for key in sorted(judges, key="paper".__ne__)
    }
    parts = []
    for each in printed(args.results):
        if each.columns[0] == "WR":
            yours = ours
            values = judged
            title = f"Table 1, {each.family}, AlpacaEval decoded as `{args.decoding}`"
        else:
            yours = {"": "yours"}
            values = {("", model.name): lm_eval_rates(args.out, model) for model in plan.models}
            title = f"Table 2, {each.family}"
        order = [*each.rows, *sorted({m.method for m in plan.models} - set(each.rows))]
        models = [m for m in plan.models if plan.form(m)["family"] == each.family]
        models.sort(key=lambda model: order.index(model.method))
        head = ["method", "model"]
        for column in each.columns:
            head += [column, *yours.values()]
        lines = [head, ["---"] * len(head)]
        for model in models:
            line = [model.method, label(model, best)]
            for column in each.columns:
                line.append(each.rows.get(model.method, {}).get(column, ""))
                line += [show(values[key, model.name].get(column)) for key in yours]
            lines.append(line)
        rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"{title}:\n\n{rows}")
    if not parts:
        raise SystemExit(
            f"--results has tables with columns named yours, got none in {args.results}."
        )
    return "\n\n".join([*parts, *why])


def label(model: Model, best: set[str]) -> str:
    rate = "" if model.learning_rate is None else f", lr {model.learning_rate:g}"
    return f"{model.name}{rate}{', chosen' if model.name in best else ''}"


def choose(
    plan: Plan, judged: dict[tuple[str, str], dict[str, Value]]
) -> tuple[set[str], list[str]]:
    """Each sweep's folder with the highest LC, to the printed digit, by the first judge that has
    judged all of them; of equal ones the smaller learning rate."""
    best, why = set(), []
    for sweep in dict.fromkeys(model.sweep for model in plan.models if model.sweep):
        models = [model for model in plan.models if model.sweep == sweep]
        full = [
            key
            for key in plan.file["judges"]
            if all("LC" in judged[key, model.name] for model in models)
        ]
        unknown = [model.path for model in models if model.learning_rate is None]
        if unknown:
            why.append(
                f"{sweep}: not chosen, no complete trainer_state.json in {', '.join(unknown)}."
            )
        elif not full:
            why.append(
                f"{sweep}: not chosen, no judge has judged all of its {len(models)} folders."
            )
        else:
            key = full[0]

            def rank(model: Model, key: str = key) -> tuple[float, float]:
                return -round(judged[key, model.name]["LC"][0], 1), model.learning_rate or 0.0

            first = min(models, key=rank)
            best.add(first.name)
            lc = show(judged[key, first.name]["LC"])
            why.append(
                f"{sweep}: learning rate {first.learning_rate:g}, LC {lc} by the {key} judge, "
                f"of {len(models)} folders."
            )
    return best, why


# --- answers ------------------------------------------------------------------------------------


def answers(plan: Plan, args: argparse.Namespace) -> str:
    """Each model's answers to the questions that contain a text."""
    parts = []
    for model in plan.models:
        file = answers_file(args.out, args.decoding, model)
        if (args.models and model.name not in args.models) or not file.exists():
            continue
        for row in rows_of(file):
            if (args.question or QUESTION) in row["instruction"]:
                parts.append(f"## {model.name}\n\n{row['instruction']}\n\n{row['output']}")
    if not parts:
        asked = args.question or QUESTION
        raise SystemExit(
            f"no answer to a question with {asked!r} under {args.out}; generate first."
        )
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description="From models.yml to the filled tables.")
    parser.add_argument("command", choices=["configs", "generate", "judge", "table", "answers"])
    add = parser.add_argument
    add("--models", nargs="+", metavar="NAME", help="default: all that exist")
    add("--benchmarks", nargs="+", choices=BENCHMARKS, default=BENCHMARKS)
    add("--decoding", default="simpo", help="a name under decodings in models.yml")
    add("--judge", default="other", help="a name under judges in models.yml")
    add("--question", help="ask, or print, only AlpacaEval's questions that contain this")
    add(
        "--in-process", action="store_true", help="AlpacaEval with the old vLLM of this environment"
    )
    add("--resamples", type=int, default=50, help="draws for the error of LC; 1 gives none")
    add("--out", type=Path, default=Path("outputs/eval"))
    add("--file", type=Path, default=HERE / "models.yml")
    add("--results", type=Path, default=HERE.parent / "RESULTS.md", help="the paper's tables")
    add("--vllm", default="vllm", help="the vllm command of another environment")
    add("--arena-hard", default="arena-hard", help="the checkout of Arena-Hard-Auto")
    add("--arena-python", default=sys.executable, help="the Python that runs it")
    add("--alpaca-data", help="a file in place of the hub's questions and reference answers")
    args = parser.parse_args()
    if args.resamples < 1:
        parser.error(f"--resamples is at least 1, got {args.resamples}")
    for option, place in (("--out", args.out), ("--file", args.file), ("--results", args.results)):
        if place.exists() and place.is_dir() != (option == "--out"):
            parser.error(f"{option} is a {'folder' if option == '--out' else 'file'}, got {place}")
    if not args.results.exists():
        parser.error(f"--results is a file with the paper's tables, got {args.results}")
    plan = load(args.file)
    for option, known in (("decoding", "decodings"), ("judge", "judges")):
        if getattr(args, option) not in plan.file[known]:
            names = ", ".join(plan.file[known])
            raise SystemExit(f"--{option}: one of {names}, got {getattr(args, option)}.")
    if args.command in ("configs", "generate", "judge"):
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--out is a folder, got {args.out}: {error}")
    if args.command == "configs":
        # For servers that you start, under the models' names.
        print(configs(replace(plan, mark=""), args.out))
    elif args.command == "generate":
        generate(plan, args)
    elif args.command == "judge":
        judge(plan, args)
    else:
        print({"table": table, "answers": answers}[args.command](plan, args))


if __name__ == "__main__":
    main()
