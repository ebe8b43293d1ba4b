"""What a training reports to: the log, TensorBoard and wandb. A full disk ends it with one line."""

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from basicsr.utils import get_env_info, get_root_logger, get_time_str, init_tb_logger
from basicsr.utils.options import dict2str

from tlw_basicsr.compat import tell_basicsr
from tlw_basicsr.engine.preflight import get_wandb_options
from tlw_basicsr.util.errors import UserError, clean_line, first_line, reason_of
from tlw_basicsr.util.kinds import Options


class LogFile(logging.FileHandler):
    """A log's file, which ends the program when it can't be written."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Raise a :class:`UserError` for the error that writing has met."""
        error = sys.exc_info()[1] or OSError("unknown")
        logging.getLogger("basicsr").removeHandler(self)
        with suppress(OSError, AttributeError):
            self.stream.close()  # type: ignore[union-attr]  which would fail again when Python ends
        raise UserError(f"{self.baseFilename} can't be written ({reason_of(error)})") from error


def start_log(opt: Options, kind: str) -> logging.Logger:
    """Let BasicSR's logger write to a new file too, in the first process."""
    logger = get_root_logger()
    for file in [handler for handler in logger.handlers if isinstance(handler, LogFile)]:  # an earlier training's
        logger.removeHandler(file)
        file.close()
    logger.addFilter(clean_record)
    if opt["rank"] == 0:
        name = f"{kind}_{opt['name']}_{get_time_str()}.log"
        file = LogFile(Path(opt["path"]["log"], name), "a")  # two may start in a second
        file.setFormatter(logger.handlers[0].formatter)
        logger.addHandler(file)
        logger.setLevel(logging.INFO)
    logger.info(get_env_info())
    logger.info(tell_basicsr())
    logger.info(dict2str(opt))
    return logger


def clean_record(record: logging.LogRecord) -> bool:
    """Clean the log's text, which may come from a file; further lines of a message begin with a space."""
    record.msg, record.args = "\n ".join(map(clean_line, record.getMessage().split("\n"))), ()
    return True


def start_tensorboard(opt: Options) -> Any:
    """Return the first process's ``SummaryWriter``, or None; start wandb before it, which reads what is written.

    BasicSR's own function asks wandb for ``wandb.util.generate_id``, which is no longer there.
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
        return init_tb_logger(log_dir=folder)


def hide_tensorboards(failed: Any) -> None:
    """Leave out the traceback of TensorBoard's thread: its error is raised again where the next value is written."""
    if not isinstance(failed.exc_value, OSError) or not type(failed.thread).__module__.startswith("tensorboard"):
        threading.__excepthook__(failed)


@contextmanager
def named_file(path: str | None) -> Iterator[None]:
    """Let an error of the operating system that names no file, such as TensorBoard's, name ``path``."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or path
        raise
