"""BasicSR's training and testing, as ``train.py`` and ``test.py`` run them."""

import logging
import shlex
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from basicsr.data import build_dataloader
from basicsr.data.prefetch_dataloader import CUDAPrefetcher
from basicsr.utils import (
    MessageLogger,
    get_env_info,
    get_root_logger,
    get_time_str,
    init_tb_logger,
    make_exp_dirs,
    mkdir_and_rename,
)
from basicsr.utils.dist_util import master_only
from basicsr.utils.options import dict2str
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from tlw_basicsr.compat import tell_basicsr
from tlw_basicsr.data.resumable import CheckedDataset, ResumableSampler, SeededDataset
from tlw_basicsr.engine.distributed import join_or_fail
from tlw_basicsr.engine.options import parse_options
from tlw_basicsr.engine.preflight import check_batch, check_files, check_folders, get_wandb_options
from tlw_basicsr.engine.rehearsal import rehearse
from tlw_basicsr.models import build_model
from tlw_basicsr.models.states import DamagedState, find_best_iterations, find_state, list_states, prune, strip_options
from tlw_basicsr.models.validation import names_of_sets
from tlw_basicsr.util.errors import UserError, clean, clean_line, files_in_a_line, first_line, reason_of
from tlw_basicsr.util.files import hold_lock, remove_leftovers, write_text
from tlw_basicsr.util.kinds import Options
from tlw_basicsr.util.signals import StopSignals, end_with_parent


@files_in_a_line()
def train_pipeline(root_path: str, argv: list[str] | None = None) -> None:
    """BasicSR's training, exact on resume: experiments, logs and TensorBoard files are made in ``root_path``.

    Args:
        root_path: the folder.
        argv: the command line's arguments, ``sys.argv[1:]`` if None.

    Raises:
        UserError: An option, image or checkpoint is wrong, or a file can't be written. One iteration and one validation
            are rehearsed before any folder is made or moved.
        SystemExit: SIGTERM or SIGINT stopped the training after an iteration, which is saved; 128 + the signal.
    """
    opt, args = parse_options(root_path, is_train=True, argv=argv)
    opt["root_path"] = root_path
    torch.backends.cudnn.benchmark = True
    states = Path(opt["path"]["training_states"])
    saved = opt["auto_resume"] and list_states(states)
    failure, summary = None, ""
    resume_state, notes = None, []
    try:
        resume_state, notes = find_state(opt)
        check_files(opt)
        summary, unread = rehearse(opt, args.given)
        notes = [*unread, *notes]
    except UserError as error:
        failure = error
    join_or_fail(opt, failure)
    with lock_experiment(opt, notes.append):
        if opt["auto_resume"] and saved != list_states(states):  # another training has just ended
            resume_state, more = find_state(opt)
            notes += more
        make_folders(opt, args, resume_state is not None)
        wait_for_all(opt)
        train(opt, resume_state, notes, summary)


@contextmanager
def lock_experiment(opt: Options, warn: Callable[[str], object]) -> Iterator[None]:
    """Within it, the experiment's folder is this training's alone. The first process holds the lock for all.

    Raises:
        UserError: another training holds it.
        SystemExit: so in the other processes, without a message.
    """
    folder = Path(opt["path"]["experiments_root"])
    with ExitStack() as stack:
        failure = None
        if opt["rank"] == 0:
            try:
                stack.enter_context(hold_lock(folder.with_name(f".{folder.name}.lock"), str(folder), warn))
            except (UserError, OSError) as error:
                failure = error
        told = [failure and True]
        if opt["dist"]:
            dist.broadcast_object_list(told)  # also waits: one process moves folders that others may be reading
        if failure:
            raise failure
        if told[0]:
            sys.exit(2)
        yield


def train(opt: Options, resume_state: dict[str, Any] | None, notes: list[str], summary: str = "") -> None:
    """Train in the folders that are made, from a state or the start; ``notes`` and ``summary`` are for the log."""
    # The logger must not be used above: its file lies in the new folder.
    logger = start_log(opt, "train")
    for note in notes:
        logger.warning(clean(note))
    if summary:
        logger.info(summary)
    tb_logger = start_tensorboard(opt)

    while True:
        model = build_model(opt)
        model.given_options = strip_options(opt)
        loader, sampler = train_data(opt)
        val_loaders = validation_data(opt)
        damaged = resume(model, resume_state)
        if damaged is None:
            break
        resume_state, notes = find_state(opt, damaged)
        for note in notes:
            logger.warning(clean(note))
    stop = StopSignals(opt["dist"], model.device)
    for each in (loader, *val_loaders):
        each.worker_init_fn = stop.leave_to_parent(each.worker_init_fn)
    total_iters = int(opt["train"]["total_iter"])
    logger.info(
        f"Training: {len(sampler.dataset):,} images, {len(loader):,} iterations an epoch, {total_iters:,} in all, "
        f"batch of {opt['datasets']['train']['batch_size_per_gpu']} on each of {opt['world_size']} processes."
    )
    current_iter = 0
    if resume_state:
        current_iter = resume_state["iter"]
        logger.info(f"Resuming after iteration {current_iter:,}.")
    # An epoch begins anew where another batch size or number of processes has changed its length.
    position = (resume_state or {}).get("position") or {"epoch": 0, "iter": 0, "iters_per_epoch": len(loader)}
    if resume_state and position["iters_per_epoch"] != len(loader):
        epoch = resume_state["epoch"] + 1
        logger.warning(
            f"An epoch had {position['iters_per_epoch']} iterations, now {len(loader)}; epoch {epoch} begins."
        )
        position = {"epoch": epoch, "iter": current_iter, "iters_per_epoch": len(loader)}
    model.position = position

    def validate() -> None:
        for val_loader in val_loaders:
            try:
                model.validation(val_loader, current_iter, tb_logger, opt["val"]["save_img"])
            except Exception as error:  # of what kind is up to the model; the training has lost nothing
                if opt["dist"]:
                    raise  # the other processes may wait for this one in the middle of it
                reason = str(error) if isinstance(error, UserError) else first_line(error)
                name = getattr(val_loader.dataset, "opt")["name"]  # noqa: B009, a torch Dataset has none
                logger.error(f"The validation on {name} after iteration {current_iter:,} fails ({reason}); going on.")

    def save() -> None:
        logger.info("Saving models and training states.")
        model.save(epoch, current_iter)
        if opt["rank"] == 0:
            val = opt.get("val") or {}
            metric = val.get("save_best") or next(iter(val.get("metrics") or {}), None)
            prune(opt, current_iter, find_best_iterations(getattr(model, "best_metric_results", {}), metric))

    message_logger = MessageLogger(opt, current_iter, tb_logger)
    data_timer, iter_timer = AverageTimer(), AverageTimer()
    show_bar = opt["rank"] == 0 and sys.stderr.isatty()
    bar = tqdm(total=total_iters, initial=current_iter, unit="it", disable=not show_bar, dynamic_ncols=True)
    with bar, logging_redirect_tqdm([logger]), stop:
        trained = current_iter < total_iters
        while current_iter < total_iters:
            epoch, done = divmod(current_iter - position["iter"], len(loader))
            epoch += position["epoch"]
            sampler.set_position(epoch, done * (loader.batch_size or 1))
            if hasattr(model, "set_epoch"):
                model.set_epoch(epoch)
            data_timer.start()
            iter_timer.start()
            for batch in batches(loader, opt):
                data_timer.record()
                current_iter += 1
                model.update_learning_rate(current_iter, warmup_iter=opt["train"].get("warmup_iter", -1))
                model.feed_data(batch)
                model.optimize_parameters(current_iter)
                iter_timer.record()
                bar.update()
                validating = val_loaders and current_iter % opt["val"]["val_freq"] == 0
                if validating or current_iter % opt["logger"]["print_freq"] == 0:
                    times = {"time": iter_timer.get_avg_time(), "data_time": data_timer.get_avg_time()}
                    lrs = model.get_current_learning_rate()
                    message_logger(
                        {"epoch": epoch, "iter": current_iter, "lrs": lrs, **times, **model.get_current_log()}
                    )
                if validating:
                    validate()
                stopping = stop.agreed()
                if stopping or current_iter % opt["logger"]["save_checkpoint_freq"] == 0:
                    save()  # after the validation: the state holds the best metrics
                if stopping:
                    logger.info(
                        f"Stopped by {signal.Signals(stopping).name} after iteration {current_iter:,}; "
                        "--auto_resume goes on from here."
                    )
                    close_tensorboard(tb_logger)
                    leave_together(opt)
                    sys.exit(128 + stopping)
                if current_iter >= total_iters:
                    break
                data_timer.start()
                iter_timer.start()

        logger.info("End of training. Save the latest model.")
        model.save(epoch=-1, current_iter=-1)
        if val_loaders and current_iter % opt["val"]["val_freq"]:
            validate()
        if trained and current_iter % opt["logger"]["save_checkpoint_freq"]:
            save()  # a later run may go further
    close_tensorboard(tb_logger)
    leave_together(opt)  # the first process may still be validating


class AverageTimer:
    """Mean seconds of the newest steps: as BasicSR's AvgTimer, which those before 1.3.4.2 lack."""

    def __init__(self) -> None:
        self.seconds: deque[float] = deque(maxlen=200)
        self.start()

    def start(self) -> None:
        """Begin a step."""
        self.begun = time.perf_counter()

    def record(self) -> None:
        """End a step, and begin the next."""
        self.seconds.append(time.perf_counter() - self.begun)
        self.start()

    def get_avg_time(self) -> float:
        """Their mean, 0 before the first."""
        return sum(self.seconds) / max(len(self.seconds), 1)


def resume(model: Any, state: dict[str, Any] | None) -> DamagedState | None:
    """Let every process's model take a state, or none; returns why one of them can't."""
    damaged = None
    if state:
        try:
            model.resume_training(state)
        except DamagedState as error:
            damaged = error
        if not model.agreed(torch.tensor(damaged is None, device=model.device)):
            return damaged or DamagedState(
                f"path.resume_state: another process can't take the state of {state['iter']}"
            )
    return damaged


def wait_for_all(opt: Options) -> None:
    """Wait until every process is here."""
    if opt["dist"]:
        dist.barrier()


def leave_together(opt: Options) -> None:
    """Wait until every process is here, and leave their group: one that just ends may break another's connection."""
    wait_for_all(opt)
    if opt["dist"]:
        dist.destroy_process_group()


def start_log(opt: Options, kind: str) -> logging.Logger:
    """BasicSR's logger with a new file, which tells when it can't be written."""
    log_file = Path(opt["path"]["log"], f"{kind}_{opt['name']}_{get_time_str()}.log")
    logger = get_root_logger(log_level=logging.INFO, log_file=str(log_file))
    logger.addFilter(clean_record)
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handleError = partial(fail_to_log, handler)  # type: ignore[method-assign]
    logger.info(get_env_info())
    logger.info(tell_basicsr())
    logger.info(dict2str(opt))
    return logger


def clean_record(record: logging.LogRecord) -> bool:
    """A filter of the log that cleans its text, which may come from a file; a further line begins with a space."""
    record.msg, record.args = "\n ".join(map(clean_line, record.getMessage().split("\n"))), ()
    return True


def start_tensorboard(opt: Options) -> Any:
    """The first process's ``SummaryWriter``, or None, and before it wandb, which reads what is written.

    BasicSR's own asks wandb for ``wandb.util.generate_id``, which is no longer there.

    Raises:
        UserError: wandb can't start.
    """
    if opt["rank"] or not opt["logger"]["use_tb_logger"] or "debug" in opt["name"]:
        return None
    if options := get_wandb_options(opt):
        import wandb  # type: ignore[import-not-found]

        run_id, project = options.get("resume_id"), options["project"]
        resume = "allow" if run_id else "never"
        try:
            run = wandb.init(
                id=run_id, resume=resume, name=opt["name"], config=opt, project=project, sync_tensorboard=True
            )
        except Exception as error:
            raise UserError(f"logger.wandb: can't start ({first_line(error)})") from error
        get_root_logger().info(f"wandb: project {project}, resume_id {run.id}.")
    folder = str(Path(opt["root_path"], "tb_logger", opt["name"]))
    threading.excepthook = hide_tensorboards
    with named_file(folder):
        tb_logger = init_tb_logger(log_dir=folder)
    writer = tb_logger.file_writer.event_writer
    writer.add_event = partial(add_event, writer.add_event, folder)
    return tb_logger


def hide_tensorboards(failed: Any) -> None:
    """A hook for errors in threads: TensorBoard's is raised again where the next value is written."""
    if not isinstance(failed.exc_value, OSError) or not type(failed.thread).__module__.startswith("tensorboard"):
        threading.__excepthook__(failed)


def add_event(add: Callable[[Any], None], folder: str, event: Any) -> None:
    """Write one of TensorBoard's events by ``add``; an error names its folder."""
    with named_file(folder):
        add(event)


@contextmanager
def named_file(path: str) -> Iterator[None]:
    """Within it, an error of the operating system that names no file names ``path``."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or path
        raise


def close_tensorboard(tb_logger: Any) -> None:
    """Write what is left, if there is a ``SummaryWriter``."""
    if tb_logger:
        with named_file(tb_logger.log_dir):
            tb_logger.close()


def fail_to_log(handler: logging.FileHandler, record: logging.LogRecord) -> None:
    """Raise a :class:`UserError` for the error that a log's handler has met; the handler is taken away."""
    error = sys.exc_info()[1] or OSError("unknown")
    with suppress(OSError, AttributeError):
        handler.stream.close()  # type: ignore[union-attr]
    handler.stream = None  # type: ignore[assignment]
    logging.getLogger("basicsr").removeHandler(handler)
    raise UserError(f"{handler.baseFilename} can't be written ({reason_of(error)})") from error


def make_folders(opt: Options, args: Any, resuming: bool) -> None:
    """Make the experiment's folders and put the YAML into them. An earlier run of the name is moved aside."""
    if not resuming:
        make_exp_dirs(opt)
        if opt["logger"]["use_tb_logger"] and "debug" not in opt["name"] and opt["rank"] == 0:
            mkdir_and_rename(str(Path(opt["root_path"], "tb_logger", opt["name"])))
    elif opt["rank"] == 0:
        for key in ("models", "training_states", "visualization"):
            Path(opt["path"][key]).mkdir(parents=True, exist_ok=True)
        remove_leftovers(opt["path"]["models"], opt["path"]["training_states"])
    keep_options(opt, args)


@master_only
def keep_options(opt: Options, args: Any) -> None:
    """Write the YAML that the training goes by, to be used again: the file, or with ``--force_yml`` all options."""
    copy = Path(opt["path"]["experiments_root"], Path(args.opt).name)
    text = Path(args.opt).read_text("utf-8")
    if args.force_yml:
        text = yaml.safe_dump(args.given, sort_keys=False, allow_unicode=True, width=120)
    elif copy.resolve() == Path(args.opt).resolve():
        return
    write_text(f"# {get_time_str()}: {shlex.join(sys.argv)}\n\n{text}", copy)


def train_data(opt: Options) -> tuple[DataLoader, ResumableSampler]:
    """The loader of the training data and its sampler."""
    dataset_opt = opt["datasets"]["train"]
    dataset = SeededDataset(CheckedDataset(dataset_opt, "datasets.train"), opt["manual_seed"])
    check_batch(len(dataset), dataset_opt, opt)
    ratio = dataset_opt.get("dataset_enlarge_ratio", 1)
    sampler = ResumableSampler(dataset, opt["world_size"], opt["rank"], ratio)
    return data_loader(dataset, dataset_opt, opt, sampler), sampler


def validation_data(opt: Options) -> list[DataLoader]:
    """The loaders of the validation sets; none without a ``val`` section."""
    sets = {key: options for key, options in opt["datasets"].items() if options["phase"] == "val"}
    if not opt.get("val"):
        return []
    datasets = [CheckedDataset(options, f"datasets.{key}") for key, options in sets.items()]
    for dataset, names in zip(datasets, names_of_sets(datasets, apart=True), strict=True):
        dataset.names = names
    return [data_loader(dataset, dataset.opt, opt) for dataset in datasets]


def data_loader(
    dataset: Dataset, dataset_opt: Options, opt: Options, sampler: ResumableSampler | None = None
) -> DataLoader:
    """BasicSR's loader, with a random generator of its own: beginning to read it leaves the training's alone."""
    loader = build_dataloader(
        dataset, dataset_opt, num_gpu=opt["num_gpu"], dist=opt["dist"], sampler=sampler, seed=opt["manual_seed"]
    )
    loader.generator = torch.Generator().manual_seed(opt["manual_seed"])
    loader.worker_init_fn = partial(end_with_parent, loader.worker_init_fn)
    return loader


def batches(loader: DataLoader, opt: Options) -> Iterator[dict[str, Any]]:
    """The batches from the sampler's position to the end of the epoch, by the prefetcher of the options."""
    if opt["datasets"]["train"].get("prefetch_mode") != "cuda":
        yield from loader
        return
    prefetcher = CUDAPrefetcher(loader, opt)
    while (batch := prefetcher.next()) is not None:
        yield batch


def leave_out_missing_sets(datasets: Options) -> list[str]:
    """Take the test sets away whose folders are not there, unless that leaves none, as the tables do; says which."""
    reasons = {}
    for key, dataset_opt in datasets.items():
        try:
            check_folders(dataset_opt, f"datasets.{key}")
        except UserError as error:
            reasons[key] = str(error)
    if len(reasons) == len(datasets):
        return []  # which the check of the files tells
    for key in reasons:
        del datasets[key]
    return list(reasons.values())


@files_in_a_line()
def test_pipeline(root_path: str, argv: list[str] | None = None) -> None:
    """BasicSR's testing: images, metrics and the log go to ``results/{name}`` in ``root_path``.

    Args:
        root_path: the folder.
        argv: the command line's arguments, ``sys.argv[1:]`` if None.

    Raises:
        UserError: an option, image or checkpoint is wrong.
    """
    opt, args = parse_options(root_path, is_train=False, argv=argv)
    left_out = leave_out_missing_sets(opt["datasets"])
    failure, summary, notes = None, "", []
    try:
        check_files(opt)
        summary, notes = rehearse(opt, args.given)
    except UserError as error:
        failure = error
    join_or_fail(opt, failure)
    make_exp_dirs(opt)
    logger = start_log(opt, "test")
    for note in [*(f"{reason}; this test set is left out." for reason in left_out), *notes]:
        logger.warning(clean(note))
    logger.info(summary)

    model = build_model(opt)
    for key, dataset_opt in sorted(opt["datasets"].items()):
        dataset = CheckedDataset(dataset_opt, f"datasets.{key}")
        (dataset.names,) = names_of_sets([dataset], apart=False)
        loader = data_loader(dataset, dataset_opt, opt)
        logger.info(f"Testing {dataset_opt['name']}: {len(dataset)} images.")
        try:
            model.validation(loader, current_iter=opt["name"], tb_logger=None, save_img=opt["val"]["save_img"])
        except UserError:
            raise
        except Exception as error:  # of what kind is up to the model
            raise UserError(f"datasets.{key}: the test fails ({first_line(error)})") from error
