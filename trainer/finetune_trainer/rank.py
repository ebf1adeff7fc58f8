"""`python -m finetune_trainer.rank`: one rank of a run, started by the supervisor; ends with a code of the contract.

What is done already is never done again: the log says which checkpoint to go on from, whether training is over, and
which baselines, evaluations and publications exist. All ranks train; then rank 0 alone evaluates and publishes, and
the other nodes are free.
"""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune_api.contract import ExitCode, LastMessage, RunConfig, TrainOutcome
from finetune_trainer import lastmessage, logs, oom
from finetune_trainer.config import storage_settings
from finetune_trainer.run import read_inputs
from finetune_trainer.signs import Heart, Reporter, Signals, Stopped, wait_for
from finetune_trainer.storage import Damaged, NotFound, StorageError, open_store
from finetune_trainer.storage.commit import Fenced, latest_checkpoint, superseded

_log = logging.getLogger("finetune.train")


def main(arguments: Sequence[str] | None = None) -> int:
    """Torch is imported later, by Rank: signals and signs of life come first."""
    options = _options(arguments)
    _environment(options.work)
    logs.begin("%(asctime)s %(levelname)s %(message)s", options.credentials)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, to their own callers
    signals = Signals()
    signals.install()
    return Rank(options, signals).main()


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="finetune_trainer.rank")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--run-id", required=True)
    parser.add_argument("--inputs")
    parser.add_argument("--credentials", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--halve-micro-batch", action="store_true")
    parser.add_argument("--finish-now", action="store_true")
    return parser.parse_args(arguments)


def _environment(work: Path) -> None:
    """No library downloads anything or writes outside of the work directory."""
    os.environ.update(
        HF_HUB_OFFLINE="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_HOME=str(work / "huggingface"),
        TOKENIZERS_PARALLELISM="false",
        CUBLAS_WORKSPACE_CONFIG=os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8"),
    )


class Rank:
    """This process's life, and what every way of it ending means."""

    def __init__(self, options: argparse.Namespace, signals: Signals) -> None:
        self._options = options
        self._signals = signals
        self._work: Path = options.work
        self._state = self._work / "state"
        self._message = self._state / "message.json"
        self._rank = int(os.environ.get("RANK", "0"))
        self._beside_rank_0 = self._rank != 0 and self._rank == int(os.environ.get("LOCAL_RANK", "0"))
        self._heart = Heart(self._state, rank=self._rank, signals=signals)
        self._attempt: Any = None

    def main(self) -> int:
        """Exceptions that belong to no exit code pass through: 1 and a traceback."""
        from finetune_trainer.course import Diverged, OutOfMemory, is_out_of_memory
        from finetune_trainer.model import ModelError

        try:
            return self._done(self._run())
        except Stopped:
            return self._say(ExitCode.STOPPED, "Stopped", "Stopped on request; everything up to here is committed.")
        except Fenced as error:
            return self._say(ExitCode.FENCED, "Fenced", str(error))
        except Diverged as error:
            return self._say(
                ExitCode.DIVERGED,
                "Diverged",
                f"Training diverged twice: {error}; lower training.learningRate or training.maxGradNorm, or use fp32.",
            )
        except ModelError as error:
            return self._say(ExitCode.INVALID, "InvalidModel", str(error))
        except StorageError as error:
            return self._storage_failed(error)
        except (OutOfMemory, MemoryError, RuntimeError) as error:
            if not isinstance(error, OutOfMemory) and not is_out_of_memory(error):
                raise
            return self._out_of_memory(error)

    def _run(self) -> tuple[TrainOutcome, str | None] | None:
        from finetune_trainer import world as worlds
        from finetune_trainer.attempt import Attempt, begin, fetch_inputs
        from finetune_trainer.finish import finish
        from finetune_trainer.pinned import check_record
        from finetune_trainer.retention import measure_base
        from finetune_trainer.training import train_what_is_left

        if self._rank == 0:
            self._message.unlink(missing_ok=True)
        run_id = self._options.run_id
        reporter = Reporter(self._state, run_id=run_id, active=self._rank == 0)
        config = _config(self._options.config)
        settings = storage_settings(config, self._options.credentials)
        store = open_store(config.output.uri, settings)
        record = read_inputs(store, run_id, self._options.inputs)
        check_record(config, record)
        world = worlds.join()
        if config.pods.gpus and world.device.type == "cpu":
            _log.warning("resources ask for %d GPUs but none is visible: training on the CPU", config.pods.gpus)
        attempt = self._attempt = Attempt(
            config=config,
            record=record,
            settings=settings,
            store=store,
            work=self._work,
            world=world,
            signals=self._signals,
            heart=self._heart,
            reporter=reporter,
            cache_root=self._options.cache,
            finish_now=self._options.finish_now,
        )
        if not begin(attempt, halve=self._options.halve_micro_batch):
            fetch_inputs(attempt)
            measure_base(attempt)
            train_what_is_left(attempt)
        world.leave()
        if world.leads:
            return finish(attempt)
        self._signals.ignore()
        return None

    def _done(self, finished: tuple[TrainOutcome, str | None] | None) -> int:
        if finished is None:
            self._wait_for_rank_0()
            return ExitCode.DONE
        outcome, unmet = finished
        if unmet is not None:
            return self._say(ExitCode.GATE, "GateNotMet", unmet, result=outcome)
        tuned = outcome.evaluation.tuned or {}
        primary = self._attempt.config.primary
        measured = f"; {primary} {tuned[primary]:.4f} on {outcome.evaluation.on}" if primary in tuned else ""
        steps = f"{outcome.final_step} of {outcome.total_steps}" if outcome.partial else f"{outcome.final_step}"
        message = f"Trained {steps} steps and published {outcome.model.uri}{measured}."
        return self._say(ExitCode.DONE, "Completed", message, result=outcome)

    def _wait_for_rank_0(self) -> None:
        """The supervisor ends a pod's ranks together, so those beside rank 0 stay until it is done."""
        if self._beside_rank_0:
            wait_for(self._message, self._heart.beat)

    def _storage_failed(self, error: StorageError) -> int:
        """What an attempt misses that a newer one has superseded, that one has deleted."""
        claim = self._attempt.claim if self._attempt is not None else None
        if claim is not None and isinstance(error, NotFound | Damaged):
            fenced = superseded(claim)
            if fenced is not None:
                return self._say(ExitCode.FENCED, "Fenced", str(fenced))
        found = lastmessage.failure(error)
        return self._say(ExitCode(found.code), found.reason, found.message)

    def _out_of_memory(self, error: BaseException) -> int:
        from finetune_trainer.attempt import note_memory
        from finetune_trainer.course import OutOfMemory, is_gpu_memory

        if isinstance(error, OutOfMemory) and self._attempt is not None:
            try:
                note_memory(self._attempt, error)
            except StorageError as failure:
                _log.warning("the next attempt will not know of this: %s", failure)
        what = str(error) if isinstance(error, OutOfMemory) else "memory is exhausted"
        if is_gpu_memory(error):
            advice = "choose a GPU with more memory, a method with fewer weights, or a lower data.maxLength"
            return self._say(ExitCode.MEMORY, "GpuOutOfMemory", f"Out of GPU memory: {what}; {advice}.")
        return self._say(ExitCode.MEMORY, "HostOutOfMemory", f"Out of memory: {what}; {oom.ADVICE}.")

    def _say(self, code: ExitCode, reason: str, message: str, *, result: TrainOutcome | None = None) -> int:
        """Log the end, and on rank 0 write the last message."""
        secrets = lastmessage.secrets_of(self._options.credentials)
        _log.info("%s", lastmessage.scrub(f"{reason}: {message}", secrets))
        if self._rank == 0:
            last = LastMessage(
                code=code,
                reason=reason,
                message=lastmessage.clip(message),
                run_id=self._options.run_id,
                result=result,
            ).model_copy(update=self._where())
            self._state.mkdir(parents=True, exist_ok=True)
            temporary = self._message.with_suffix(".tmp")
            lastmessage.write(temporary, last, secrets)
            os.replace(temporary, self._message)
        return code

    def _where(self) -> dict[str, int | None]:
        """Attempt and steps, as far as they are known."""
        if self._attempt is None or self._attempt.claim is None:
            return {}
        last = self._attempt.trained or latest_checkpoint(self._attempt.records)
        return {
            "attempt": self._attempt.number,
            "step": last.body["step"] if last else None,
            "resumed_from_step": self._attempt.reporter.progress.resumed_from_step,
        }


def _config(path: Path) -> RunConfig:
    """Raises StorageError InvalidConfig."""
    try:
        return RunConfig.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise StorageError(
            "InvalidConfig",
            f"The run's config {path} cannot be read ({type(error).__name__}): operator and trainer must match.",
            environment=False,
        ) from error


if __name__ == "__main__":
    sys.exit(main())
