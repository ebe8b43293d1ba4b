"""BasicSR's training and testing, which ``train.py`` and ``test.py`` run."""

import math
import os
import shlex
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
import yaml
from basicsr.data import build_dataloader
from basicsr.data.prefetch_dataloader import CUDAPrefetcher
from basicsr.utils import MessageLogger, get_root_logger, get_time_str, make_exp_dirs
from basicsr.utils.dist_util import master_only
from basicsr.utils.registry import DATASET_REGISTRY
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from tlw_basicsr.compat import mkdir_and_rename
from tlw_basicsr.data.cache import CacheClient, use_cache
from tlw_basicsr.data.resumable import CheckedDataset, Draw, NamedDataset, ResumableSampler, SeededDataset
from tlw_basicsr.engine.distributed import fail_together, join_after
from tlw_basicsr.engine.logs import named_file, start_log, start_tensorboard
from tlw_basicsr.engine.options import parse_options
from tlw_basicsr.engine.preflight import check_batch, check_files, check_folders
from tlw_basicsr.engine.rehearsal import rehearse, silence
from tlw_basicsr.engine.resume import DamagedState, find_state, list_states, prune, set_aside, strip_options, take
from tlw_basicsr.models import build_model
from tlw_basicsr.models.validation import names_of_sets
from tlw_basicsr.registry import OTHER, find_origin, lookup
from tlw_basicsr.util.errors import UserError, clean, files_in_a_line, first_line
from tlw_basicsr.util.files import hold_lock, remove_leftovers, write_text
from tlw_basicsr.util.kinds import Options
from tlw_basicsr.util.progress import announce
from tlw_basicsr.util.signals import StopSignals, end_with_parent

LONG = 10  # validations without a best one, after which a warning is due


@files_in_a_line()
def train_pipeline(root_path: str, argv: list[str] | None = None) -> None:
    """Train as BasicSR does, but exact on resume; ``root_path`` is the folder of experiments and TensorBoard files.

    Raises:
        UserError: An option, image or checkpoint is wrong, or a file can't be written. One iteration and one validation
            are rehearsed before any folder is made or moved.
        SystemExit: SIGTERM or SIGINT stopped the training after an iteration, which is saved; 128 + the signal.
    """
    opt, args = parse_options(root_path, is_train=True, argv=argv)
    opt["root_path"] = root_path
    set_deterministic(opt.get("deterministic", False))
    states = Path(opt["path"]["training_states"])
    saved = opt["auto_resume"] and list_states(states)
    with join_after(opt):
        report = announce if opt["rank"] == 0 else str
        state, found = find_state(opt)
        report("Reading the headers of the images …")
        check_files(opt)
        report("Rehearsing an iteration and the validations …")
        summary, notes = rehearse(opt, args.given)
        notes += found
        pixels, cached = fill_cache(opt)
    with lock_experiment(opt, notes.append):
        if opt["auto_resume"] and saved != list_states(states):  # another training has just ended
            state, found = find_state(opt)
            notes += found
        make_folders(opt, args, state is not None)
        if opt["dist"]:
            dist.barrier()
        train(opt, state, notes, [summary, cached], pixels)


def set_deterministic(deterministic: bool) -> None:
    """Let torch compute by deterministic algorithms alone; where a plugin has chosen that, it stays so."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not (deterministic or torch.are_deterministic_algorithms_enabled())


@contextmanager
def lock_experiment(opt: Options, warn: Callable[[str], object]) -> Iterator[None]:
    """Keep other trainings out of the experiment's folder; the first process holds the lock for all."""
    folder = Path(opt["path"]["experiments_root"])
    with ExitStack() as stack:
        failure = None
        if opt["rank"] == 0:
            try:
                stack.enter_context(hold_lock(folder.with_name(f".{folder.name}.lock"), str(folder), warn))
            except (UserError, OSError) as error:
                failure = error
        fail_together(opt, failure)  # which also waits: one process moves folders that others may be reading
        yield


def train(
    opt: Options, state: dict[str, Any] | None, notes: list[str], lines: list[str], pixels: CacheClient | None
) -> None:
    """Train in the experiment's folders from a state or from the start; ``notes`` and ``lines`` are for the log."""
    # The logger must not be used before this: its file lies in the new folder.
    logger = start_log(opt, "train")
    for line in filter(None, lines):
        logger.info(line)
    if opt.get("deterministic"):
        logger.info("deterministic: cuDNN does not search for its fastest algorithms, and some of torch's are slower.")
    tb_logger = start_tensorboard(opt)
    damaged: DamagedState | None = None
    while True:
        for note in notes:
            logger.warning(clean(note))
        model = build_model(opt)
        model.given_options = strip_options(opt)
        loader, sampler = train_data(opt, pixels)
        val_loaders = validation_data(opt)
        damaged = take(model, state)
        if damaged is None:
            break
        state, notes = find_state(opt, damaged)
    for note in set_aside(opt, state) if state and opt["rank"] == 0 else ():
        logger.warning(note)
    with named_file(getattr(tb_logger, "log_dir", None)):
        Training(opt, model, (loader, sampler), val_loaders, tb_logger, state).run()
        if tb_logger:
            tb_logger.close()
    leave_together(opt)  # the first process may still be validating


class Training:
    """The iterations of a training, with what is logged, validated and saved between them.

    ``state`` is the state that it goes on from, which ``model`` has taken.
    """

    def __init__(
        self,
        opt: Options,
        model: Any,
        data: tuple[DataLoader, ResumableSampler],
        val_loaders: list[DataLoader],
        tb_logger: Any,
        state: dict[str, Any] | None,
    ) -> None:
        self.opt, self.model, self.val_loaders, self.tb_logger = opt, model, val_loaders, tb_logger
        self.loader, self.sampler = data
        self.logger = get_root_logger()
        self.total_iters = int(opt["train"]["total_iter"])
        self.logger.info(
            f"Training: {len(self.sampler.dataset):,} images, {len(self.loader):,} iterations an epoch, "
            f"{self.total_iters:,} in all, batch of {opt['datasets']['train']['batch_size_per_gpu']} on each of "
            f"{opt['world_size']} processes."
        )
        self.start = self.current_iter = state["iter"] if state else 0
        if state:
            self.logger.info(f"Resuming after iteration {self.current_iter:,}.")
        model.position = self.position = self.find_position(state)
        self.epoch = self.position["epoch"]
        self.stop = StopSignals(opt["dist"], model.device)
        for each in (self.loader, *val_loaders):
            each.worker_init_fn = self.stop.leave_to_parent(each.worker_init_fn)
        # of the newest iterations, and of reading their data; BasicSR's AvgTimer is missing before 1.3.4.2
        self.seconds: deque[tuple[float, float]] = deque(maxlen=200)
        self.message_logger = MessageLogger(opt, self.current_iter, tb_logger)

    def find_position(self, state: dict[str, Any] | None) -> dict[str, int]:
        """Return an epoch, the iteration it began after, and its length, from which all later epochs are counted.

        An epoch begins anew where another batch size or number of processes has changed its length.
        """
        length = len(self.loader)
        position = (state or {}).get("position") or {"epoch": 0, "iter": 0, "iters_per_epoch": length}
        if state and position["iters_per_epoch"] != length:
            epoch = state["epoch"] + 1
            self.logger.warning(
                f"An epoch had {position['iters_per_epoch']} iterations, now {length}; epoch {epoch} begins."
            )
            position = {"epoch": epoch, "iter": self.current_iter, "iters_per_epoch": length}
        return position

    def run(self) -> None:
        """Train until ``train.total_iter``, or until a signal has stopped it."""
        show_bar = self.opt["rank"] == 0 and sys.stderr.isatty()
        self.bar = tqdm(
            total=self.total_iters, initial=self.current_iter, unit="it", disable=not show_bar, dynamic_ncols=True
        )
        with self.bar, logging_redirect_tqdm([self.logger]), self.stop:
            while self.current_iter < self.total_iters:
                try:
                    self.run_epoch()
                except Exception as error:
                    if isinstance(error, UserError) or not 0 < self.start >= self.current_iter - 1:
                        raise
                    where = self.opt["path"]["resume_state"]
                    raise UserError(f"{where}: the first iteration after it fails ({first_line(error)})") from error
            self.finish()

    def run_epoch(self) -> None:
        """Train from the present iteration to the end of its epoch, or of the training."""
        epoch, done = divmod(self.current_iter - self.position["iter"], len(self.loader))
        self.epoch = epoch + self.position["epoch"]
        self.sampler.set_position(self.epoch, done * (self.loader.batch_size or 1))
        if hasattr(self.model, "set_epoch"):
            self.model.set_epoch(self.epoch)
        begun = time.perf_counter()
        for batch in batches(self.loader, self.opt):
            data_seconds = time.perf_counter() - begun
            self.current_iter += 1
            self.model.update_learning_rate(self.current_iter, warmup_iter=self.opt["train"].get("warmup_iter", -1))
            self.model.feed_data(batch)
            self.model.optimize_parameters(self.current_iter)
            self.seconds.append((time.perf_counter() - begun, data_seconds))
            self.bar.update()
            self.end_iteration()
            if self.current_iter >= self.total_iters:
                break
            begun = time.perf_counter()

    def end_iteration(self) -> None:
        """Log, validate and save where it is due; stop if a signal has asked for it."""
        validating = self.val_loaders and self.is_due(self.opt["val"]["val_freq"])
        if validating or self.is_due(self.opt["logger"]["print_freq"]):
            seconds, data_seconds = map(fmean, zip(*self.seconds, strict=True))
            values = {"epoch": self.epoch, "iter": self.current_iter, "time": seconds, "data_time": data_seconds}
            values["lrs"] = self.model.get_current_learning_rate()
            self.message_logger({**values, **self.model.get_current_log()})
        if validating:
            self.validate()
        stopping = self.stop.agreed()
        if stopping or self.is_due(self.opt["logger"]["save_checkpoint_freq"]):
            self.save()  # after the validation: the state holds the best metrics
        if stopping:
            self.logger.info(
                f"Stopped by {signal.Signals(stopping).name} after iteration {self.current_iter:,}; "
                "--auto_resume goes on from here."
            )
            if self.tb_logger:
                self.tb_logger.close()
            leave_together(self.opt)
            sys.exit(128 + stopping)

    def is_due(self, frequency: int) -> bool:
        """Return whether something that is done every ``frequency`` iterations is due."""
        return self.current_iter % frequency == 0

    def validate(self) -> None:
        """Validate on every set. An error is logged, as the training has lost nothing."""
        for loader in self.val_loaders:
            try:
                self.model.validation(loader, self.current_iter, self.tb_logger, self.opt["val"]["save_img"])
            except Exception as error:  # the model raises what it likes
                if self.opt["dist"]:
                    raise  # the other processes may wait for this one in the middle of it
                reason = str(error) if isinstance(error, UserError) else first_line(error)
                name = getattr(loader.dataset, "opt")["name"]  # noqa: B009, a torch Dataset has none
                self.logger.error(
                    f"The validation on {name} after iteration {self.current_iter:,} fails ({reason}); going on."
                )

        self.check_progress()

    def check_progress(self) -> None:
        """Warn where the first set's best validation is long ago; end the training by ``val.patience``."""
        val = self.opt["val"]
        metric = val.get("save_best") or next(iter(val.get("metrics") or {}), None)
        name = getattr(self.val_loaders[0].dataset, "opt")["name"]  # noqa: B009, a torch Dataset has none
        best = getattr(self.model, "best_metric_results", {}).get(name, {}).get(metric, {}).get("iter", 0)
        since = (self.current_iter - best) // int(val["val_freq"]) if best > 0 else 0
        if since and since % LONG == 0:
            self.logger.warning(
                f"{metric} of {name} was best at iteration {best:,}, {since} validations ago; val.save_best keeps the "
                "networks of the best, val.patience ends a training that gets no better."
            )
        goes_on = since < (val.get("patience") or math.inf)
        if val.get("patience") and not self.model.agreed(torch.tensor(goes_on, device=self.model.device)):
            self.logger.info(f"val.patience: {metric} has been no better for {since} validations; the training ends.")
            self.total_iters = self.current_iter

    def save(self) -> None:
        """Save the networks and the state, and remove those that are not to be kept."""
        self.logger.info("Saving models and training states.")
        self.model.save(self.epoch, self.current_iter)
        if self.opt["rank"] == 0:
            val = self.opt.get("val") or {}
            metric = val.get("save_best") or next(iter(val.get("metrics") or {}), None)
            results = getattr(self.model, "best_metric_results", {}).values()
            prune(self.opt, self.current_iter, {each[metric]["iter"] for each in results if metric in each})

    def finish(self) -> None:
        """Save the latest networks; validate and save where the last iteration did not."""
        self.logger.info("End of training. Save the latest model.")
        self.model.save(epoch=-1, current_iter=-1)
        if self.val_loaders and not self.is_due(self.opt["val"]["val_freq"]):
            self.validate()
        if self.current_iter > self.start and not self.is_due(self.opt["logger"]["save_checkpoint_freq"]):
            self.save()  # a later run may go further


def leave_together(opt: Options) -> None:
    """Wait until every process is here, then leave the group: one that just ends may break another's connection."""
    if opt["dist"]:
        dist.barrier()
        dist.destroy_process_group()


@master_only
def make_folders(opt: Options, args: Any, resuming: bool) -> None:
    """Make the experiment's folders, and move an earlier training of the name aside; keep the YAML to be used again.

    The YAML is the file, or with ``--force_yml`` all options.
    """
    path = opt["path"]
    if not resuming:
        make_exp_dirs(opt)
        if opt["logger"]["use_tb_logger"] and "debug" not in opt["name"]:
            mkdir_and_rename(str(Path(opt["root_path"], "tb_logger", opt["name"])))
    else:
        for key in ("models", "training_states", "visualization"):
            Path(path[key]).mkdir(parents=True, exist_ok=True)
        remove_leftovers(path["models"], path["training_states"])
    given, copy = Path(args.opt), Path(path["experiments_root"], Path(args.opt).name)
    if args.force_yml:
        text = yaml.safe_dump(args.given, sort_keys=False, allow_unicode=True, width=120)
    elif copy.resolve() == given.resolve():
        return
    else:
        text = given.read_text("utf-8")
    write_text(f"# {get_time_str()}: {shlex.join(sys.argv)}\n\n{text}", copy)


def fill_cache(opt: Options) -> tuple[CacheClient | None, str]:
    """Fill the cache of the training set and try it; return what reads it, and a line for the log."""
    dataset_opt = opt["datasets"]["train"]
    if not dataset_opt.get("cache") or find_origin(lookup(DATASET_REGISTRY, dataset_opt, "datasets.train")) == OTHER:
        return None, ""
    with silence():
        dataset = CheckedDataset(dataset_opt, "datasets.train")
    line = use_cache(dataset.dataset, dataset_opt, dataset.where, quiet=opt["rank"] > 0)
    _ = SeededDataset(dataset, opt["manual_seed"])[Draw(0, 0, 0, 0)]  # a fork's data set may not take such images
    return dataset.file_client, line


def train_data(opt: Options, pixels: CacheClient | None) -> tuple[DataLoader, ResumableSampler]:
    """Build the loader of the training data, which may come from a cache, and its sampler."""
    dataset_opt = opt["datasets"]["train"]
    checked = CheckedDataset(dataset_opt, "datasets.train")
    if pixels:
        checked.dataset.file_client = pixels
    dataset = SeededDataset(checked, opt["manual_seed"])
    check_batch(len(dataset), dataset_opt, opt)
    ratio = dataset_opt.get("dataset_enlarge_ratio", 1)
    sampler = ResumableSampler(dataset, opt["world_size"], opt["rank"], ratio)
    return data_loader(dataset, dataset_opt, opt, sampler), sampler


def validation_data(opt: Options) -> list[DataLoader]:
    """Build the loaders of the validation sets; without a ``val`` section there are none."""
    sets = {key: options for key, options in opt["datasets"].items() if options["phase"] == "val"}
    if not opt.get("val"):
        return []
    datasets = [NamedDataset(options, f"datasets.{key}") for key, options in sets.items()]
    for dataset, names in zip(datasets, names_of_sets(datasets), strict=True):
        dataset.names = names
    return [data_loader(dataset, dataset.opt, opt) for dataset in datasets]


def data_loader(
    dataset: Dataset, dataset_opt: Options, opt: Options, sampler: ResumableSampler | None = None
) -> DataLoader:
    """Build BasicSR's loader, with a random generator of its own: beginning to read it leaves the training's alone.

    ``prefetch_mode: cpu`` is for torch's worker processes, of which there is one at least. BasicSR's own thread for it
    would share the training's random numbers, and wait for ever after an error.
    """
    dataset_opt, ahead = {**dataset_opt}, None
    if dataset_opt.pop("prefetch_mode", None) == "cpu":
        dataset_opt["num_worker_per_gpu"] = max(dataset_opt.get("num_worker_per_gpu", 0), 1)
        ahead = 1 + dataset_opt.get("num_prefetch_queue", 1)
    loader = build_dataloader(
        dataset, dataset_opt, num_gpu=opt["num_gpu"], dist=opt["dist"], sampler=sampler, seed=opt["manual_seed"]
    )
    if ahead and loader.num_workers:
        loader.prefetch_factor = ahead
    loader.generator = torch.Generator().manual_seed(opt["manual_seed"])
    loader.worker_init_fn = partial(end_with_parent, loader.worker_init_fn)
    return loader


def batches(loader: DataLoader, opt: Options) -> Iterator[dict[str, Any]]:
    """Yield the batches from the sampler's position to the end of the epoch, by the prefetcher of the options."""
    if opt["datasets"]["train"].get("prefetch_mode") != "cuda":
        yield from loader
        return
    prefetcher = CUDAPrefetcher(loader, opt)
    while (batch := prefetcher.next()) is not None:
        yield batch


def leave_out_missing_sets(datasets: Options) -> list[str]:
    """Remove the test sets whose folders do not exist, unless none would be left; return the reasons."""
    reasons = {}
    for key, dataset_opt in datasets.items():
        try:
            check_folders(dataset_opt, f"datasets.{key}")
        except UserError as error:
            reasons[key] = str(error)
    if len(reasons) == len(datasets):
        return []  # the check of the files reports them
    for key in reasons:
        del datasets[key]
    return list(reasons.values())


@files_in_a_line()
def test_pipeline(root_path: str, argv: list[str] | None = None) -> None:
    """Test as BasicSR does; ``results/{name}`` in ``root_path`` gets the images, metrics and the log."""
    opt, args = parse_options(root_path, is_train=False, argv=argv)
    left_out = leave_out_missing_sets(opt["datasets"])
    with join_after(opt):
        check_files(opt)
        summary, notes = rehearse(opt, args.given)
    make_exp_dirs(opt)
    logger = start_log(opt, "test")
    for note in [*(f"{reason}; this test set is left out." for reason in left_out), *notes]:
        logger.warning(clean(note))
    logger.info(summary)

    model = build_model(opt)
    for key, dataset_opt in sorted(opt["datasets"].items()):
        dataset = NamedDataset(dataset_opt, f"datasets.{key}")
        (dataset.names,) = names_of_sets([dataset])
        loader = data_loader(dataset, dataset_opt, opt)
        logger.info(f"Testing {dataset_opt['name']}: {len(dataset)} images.")
        try:
            model.validation(loader, current_iter=opt["name"], tb_logger=None, save_img=opt["val"]["save_img"])
        except UserError:
            raise
        except Exception as error:  # the model raises what it likes
            raise UserError(f"datasets.{key}: the test fails ({first_line(error)})") from error
