"""The command line. What a command does not need is not imported: `validate` starts in a fraction of a second."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from finetune_api.contract import PROGRESS_PORT
from finetune_api.tasks import TASKS, MethodType

EPILOG = """\
exit codes:
  0   done; of `run`: the model is published
  42  the document or the data is wrong             43  stored data is damaged
  44  a newer attempt holds the run                 45  stopped on request after a committed checkpoint
  46  hung                                          47  the loss became NaN or infinite
  48  a gate of the evaluation was not met          49  storage or credentials unavailable
  50  out of memory                                 anything else is a crash
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    from finetune_trainer import logs

    logs.begin("%(asctime)s %(name)s: %(message)s", getattr(options, "credentials", None))
    return int(options.action(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="finetune",
        description="Fine-tune a model as a FineTuneJob document says: here with `run`, or in a cluster with kubectl.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    validate = commands.add_parser("validate", help="check documents and name every problem with line and remedy")
    validate.add_argument("files", nargs="+", metavar="FILE", help="YAML file with FineTuneJobs or FineTuneProfiles")
    validate.add_argument(
        "--profile", metavar="FILE", help="YAML file with a FineTuneProfile: what it does not allow is a problem, too"
    )
    validate.set_defaults(action=_validate)
    run = commands.add_parser(
        "run",
        help="fine-tune on this machine, no cluster needed",
        description="Run a FineTuneJob on this machine. Ctrl-C stops it after a committed checkpoint; the same command "
        "goes on from there. A run that is published already is reused. The status is printed as YAML at the end.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("file", type=Path, metavar="FILE", help="YAML file with one FineTuneJob")
    run.add_argument("--profile", type=Path, metavar="FILE", help="YAML file with a FineTuneProfile (default: none)")
    run.add_argument("--work", type=Path, metavar="DIR", help="scratch directory (default: one below ~/.cache)")
    _credentials(run)
    run.set_defaults(action=_run)
    advise = commands.add_parser(
        "advise",
        help="try several bases on your rows and say which one to tune",
        description="Try several bases on the rows of a task: license, size, tokens, predicted memory, what each knows "
        "of the task untuned, seconds an epoch takes here. Prints a table, the base to choose and why, and a "
        "FineTuneJob for it. Trains a few steps of each base, and downloads it for that.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    advise.add_argument("--data", required=True, metavar="URI", help="rows: a path, file://, s3:// or hf://")
    kinds = sorted(name for name, kind in TASKS.items() if kind.columns)  # several tasks have none of their own
    advise.add_argument("--task", required=True, choices=kinds, metavar="TASK", help=", ".join(kinds))
    advise.add_argument("--models", required=True, type=_listed, metavar="A,B,C", help="bases: paths or URIs")
    advise.add_argument("--method", default="lora", choices=get_args(MethodType), metavar="TYPE", help="default: lora")
    advise.add_argument("--columns", type=_columns, default={}, metavar="ROLE=NAME,...", help="such as text=body")
    advise.add_argument("--max-length", type=int, metavar="N", help="data.maxLength (default: the task's)")
    advise.add_argument("--output", default="tuned", metavar="URI", help="output of the FineTuneJob (default: ./tuned)")
    advise.add_argument("--profile", type=Path, metavar="FILE", help="YAML file with a FineTuneProfile (default: none)")
    advise.add_argument("--json", action="store_true", help="print everything as JSON")
    _credentials(advise)
    advise.set_defaults(action=_advise)
    data = commands.add_parser("data", help="what is in the batches of a run")
    questions = data.add_subparsers(dest="question", metavar="QUESTION", required=True)
    where = questions.add_parser(
        "where",
        help="name file and line of each row of a step",
        description="Print file and line of each row that a step of a run trains on, shortest first: of a step whose "
        "loss jumped, say. Works as soon as preflight is done, while the run goes on and afterwards. Rows that share a "
        "sequence follow each other behind its number.",
    )
    where.add_argument("file", type=Path, metavar="FILE", help="YAML file with the FineTuneJob")
    where.add_argument("--step", type=int, required=True, metavar="N", help="step, counted from 1 as progress does")
    where.add_argument("--run", metavar="ID", help="status.run.id (default: the document's run, the newest of several)")
    where.add_argument("--profile", type=Path, metavar="FILE", help="YAML file with a FineTuneProfile (default: none)")
    _credentials(where)
    where.set_defaults(action=_where)
    preflight = commands.add_parser("preflight", help="check a resolved run on a CPU (what a preflight pod does)")
    _pod_options(preflight)
    preflight.add_argument(
        "--run-id",
        metavar="ID",
        default=os.environ.get("FINETUNE_RUN") or None,
        help="the run that was begun for this document: it goes on with its rows (default: $FINETUNE_RUN, else none)",
    )
    _inputs(preflight)
    preflight.set_defaults(action=_preflight)
    train = commands.add_parser("train", help="train a resolved run (what a train pod does)")
    _pod_options(train)
    train.add_argument("--run-id", required=True, metavar="ID", help="the run that preflight has found")
    _inputs(train)
    train.add_argument("--halve-micro-batch", action="store_true", help="the attempt before was killed for its memory")
    train.add_argument("--finish-now", action="store_true", help="train no more; publish the best checkpoint")
    train.add_argument("--cache", type=Path, metavar="DIR", help="base models that pods share (default: none)")
    train.add_argument(
        "--port", type=int, default=PROGRESS_PORT, help="for /progress, /metrics and /healthz; 0: none (default: 9090)"
    )
    train.set_defaults(action=_train)
    return parser


def _credentials(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--credentials",
        type=Path,
        metavar="DIR",
        help="directory with files AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (default: the environment's)",
    )


def _inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--inputs",
        metavar="NAME",
        default=os.environ.get("FINETUNE_INPUTS") or None,
        help="what preflight has pinned for this document (default: $FINETUNE_INPUTS, else what is newest of the run)",
    )


def _pod_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, metavar="PATH", help="the resolved run, config.json")
    parser.add_argument("--credentials", type=Path, metavar="DIR", help="directory of a mounted Secret")
    parser.add_argument("--message", type=Path, metavar="PATH", help="where the last message goes")
    parser.add_argument("--work", type=Path, default=Path("/work"), metavar="DIR", help="scratch (default: /work)")


def _validate(options: argparse.Namespace) -> int:
    from finetune_api.validate import main as validate

    return validate(options.files, profile=options.profile)


def _run(options: argparse.Namespace) -> int:
    from finetune_trainer import local

    return local.main(options.file, profile=options.profile, work=options.work, credentials=options.credentials)


def _listed(text: str) -> list[str]:
    return list(dict.fromkeys(part for part in text.split(",") if part))


def _columns(text: str) -> dict[str, str]:
    """`text=body,label=intent`."""
    pairs = [part.split("=", 1) for part in text.split(",")]
    if not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise argparse.ArgumentTypeError(f"give roles and columns as text=body,label=intent, not {text!r}")
    return dict(pairs)


def _advise(options: argparse.Namespace) -> int:
    from finetune_trainer import advise

    question = advise.Question(
        data=options.data,
        task=options.task,
        models=options.models,
        method=options.method,
        columns=options.columns,
        max_length=options.max_length,
        output=options.output,
        profile=options.profile,
        credentials=options.credentials,
    )
    return advise.main(question, as_document=options.json)


def _where(options: argparse.Namespace) -> int:
    from finetune_trainer import where

    return where.main(
        options.file,
        step=options.step,
        run=options.run,
        profile=options.profile,
        credentials=options.credentials,
    )


def _preflight(options: argparse.Namespace) -> int:
    from finetune_trainer import preflight

    return preflight.main(
        config=options.config,
        credentials=options.credentials,
        message=options.message,
        work=options.work,
        run=options.run_id,
        inputs=options.inputs,
    )


def _train(options: argparse.Namespace) -> int:
    from finetune_trainer import supervisor

    return supervisor.main(
        config=options.config,
        run_id=options.run_id,
        inputs=options.inputs,
        credentials=options.credentials,
        message=options.message,
        work=options.work,
        cache=options.cache,
        halve=options.halve_micro_batch,
        finish=options.finish_now,
        port=options.port,
    )


if __name__ == "__main__":
    sys.exit(main())
