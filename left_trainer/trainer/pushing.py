"""What of a run goes to the hub, and when: the model as it is saved, the card, the report and checkpoints."""

from __future__ import annotations

import logging
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from transformers.trainer_callback import CallbackHandler, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy

from left_trainer.adapters.base_model import is_changed
from left_trainer.models import unwrapped
from left_trainer.models.hub import asking_hub, why_refused
from left_trainer.training_args import LeftTrainingArguments

logger = logging.getLogger(__name__)

# As `Trainer`, and files that are hidden: of other folders being written, and the lock.
NOT_PUSHED = ["_*", f"{PREFIX_CHECKPOINT_DIR}-*", ".*"]
# Of a checkpoint, what a model is not: PEFT's card among it, as ours is written at the end.
NOT_OF_THE_MODEL = [
    "README.md", "checkpoint_manifest.json", "global_step*", "optimizer*", "pytorch_model_fsdp*", "rng_state*",
    "scaler.pt", "scheduler.pt", "trainer_state.json",
]  # fmt: skip
LAST_CHECKPOINT = "last-checkpoint"


class PushHost(Protocol):
    """What is pushed of, and what `Trainer` keeps of pushes."""

    args: LeftTrainingArguments
    callback_handler: CallbackHandler
    control: TrainerControl
    hub_model_id: str | None
    model: Any
    push_in_progress: Any
    state: TrainerState

    @property
    def base_model_name(self) -> str: ...

    def create_model_card(self, *args: Any, **kwargs: Any) -> None: ...

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None: ...

    def is_world_process_zero(self) -> bool: ...

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None: ...


def check_may_push(args: LeftTrainingArguments) -> None:
    """Raise `ValueError` where a run is to be pushed and the hub does not know who pushes it."""
    if not args.push_to_hub:
        return
    name = args.hub_model_id or Path(str(args.output_dir)).name
    advice = "log in with `hf auth login`, or pass a token with write access: HF_TOKEN or --hub_token"
    try:
        HfApi().whoami(token=args.hub_token)
    except (LocalTokenNotFoundError, HfHubHTTPError) as error:
        status = getattr(getattr(error, "response", None), "status_code", 401)
        if status not in (401, 403):
            reason = why_refused(error, name)
            raise ValueError(f"push_to_hub=True: {name!r} {reason}") from error
        raise ValueError(f"push_to_hub=True needs to know who pushes to {constants.ENDPOINT}: {advice}.") from error
    except OSError as error:
        reason = why_refused(error, name) or str(error)
        raise ValueError(f"push_to_hub=True, and {constants.ENDPOINT} cannot be asked: {name!r} {reason}") from error


def push_run(
    trainer: PushHost,
    commit_message: str | None,
    blocking: bool,
    token: str | None,
    revision: str | None,
    private: bool | None,
    **card: Any,
) -> Any:
    """Save the model and push `output_dir`, its card anew. As `Trainer.push_to_hub`, less what is hidden.

    Raises:
        HubRefusalError: The hub does not take it. It is saved in `output_dir`.
    """
    args = trainer.args
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    token = args.hub_token if token is None else token
    if trainer.hub_model_id is None:
        trainer.init_hf_repo(token=token, private=private)
    trainer.save_model(_internal_call=True)  # by all processes
    if not trainer.is_world_process_zero():
        return None
    name = str(trainer.hub_model_id)
    tags = [card["tags"]] if isinstance(card.get("tags"), str) else card.get("tags") or []
    own = getattr(trainer.model, "model_tags", None) or []
    given = {"model_name": name.rpartition("/")[2], **card, "tags": list(dict.fromkeys([*tags, *own]))}
    trainer.create_model_card(**given)
    _warn_of_local_base(trainer)
    wait_for_pushes(trainer)
    api: Any = HfApi()
    with asking_hub("hub_model_id", name, revision=revision):
        return api.upload_folder(
            repo_id=name,
            folder_path=str(args.output_dir),
            commit_message=commit_message,
            token=token,
            run_as_future=not blocking,
            ignore_patterns=NOT_PUSHED,
            revision=revision or args.hub_revision,
        )


def push_checkpoint(trainer: PushHost, checkpoint: str) -> None:
    """Push the model of a whole checkpoint in the background and, where `hub_strategy` asks for it, the checkpoint.

    All that was saved of the model goes, not what `Trainer` has names for: an adapter's state of training, a base that
    was saved beside it and the settings of the run belong to it.
    """
    args = trainer.args
    if not trainer.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
        return
    if not args.hub_always_push and trainer.push_in_progress is not None and not trainer.push_in_progress.is_done():
        return
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    by_step = args.save_strategy != SaveStrategy.EPOCH
    progress = f"step {trainer.state.global_step}" if by_step else f"epoch {int(trainer.state.epoch or 0)}"
    options: dict[str, Any] = {
        "repo_id": trainer.hub_model_id,
        "folder_path": checkpoint,
        "token": args.hub_token,
        "revision": args.hub_revision,
        "run_as_future": True,
    }
    message, api = f"Training in progress, {progress}", HfApi()
    jobs: list[Future[Any]] = [
        api.upload_folder(commit_message=message, ignore_patterns=NOT_OF_THE_MODEL, **options)  # type: ignore[list-item]
    ]
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        place = LAST_CHECKPOINT if args.hub_strategy == HubStrategy.CHECKPOINT else Path(checkpoint).name
        jobs.append(api.upload_folder(commit_message=f"{message}, checkpoint", path_in_repo=place, **options))  # type: ignore[arg-type]
    for job in jobs:
        job.add_done_callback(_tell_failure)
    trainer.push_in_progress = _Pushes([*_running(trainer), *jobs])


class _Pushes:
    """Uploads in the background, as `Trainer` asks for them."""

    def __init__(self, jobs: list[Future[Any]]) -> None:
        self.jobs = jobs

    def is_done(self) -> bool:
        return all(job.done() for job in self.jobs)

    def wait_until_done(self) -> None:
        for job in self.jobs:
            job.exception()  # which was told


def _running(trainer: PushHost) -> list[Future[Any]]:
    pushes = trainer.push_in_progress
    return [] if pushes is None else [job for job in pushes.jobs if not job.done()]


def wait_for_pushes(trainer: PushHost) -> None:
    """Wait until nothing is uploaded any more."""
    pushes = getattr(trainer, "push_in_progress", None)
    if pushes is not None and not pushes.is_done():
        logger.info("Waiting for the upload of a checkpoint.")
        pushes.wait_until_done()


def _tell_failure(job: Future[Any]) -> None:
    error = None if job.cancelled() else job.exception()
    if error is not None:
        logger.warning("A checkpoint was not pushed; it is saved here. %s", " ".join(str(error).split()))


def _warn_of_local_base(trainer: PushHost) -> None:
    """Say that an adapter is of no use to others whose base they cannot load."""
    base = trainer.base_model_name
    if Path(base).exists() and hasattr(trainer.model, "peft_config") and not is_changed(unwrapped(trainer.model)):
        logger.warning(
            "The adapter that is pushed needs its base model, which is the folder %r of this machine. Push that too, "
            "and name it in base_model_name_or_path of adapter_config.json.",
            base,
        )
