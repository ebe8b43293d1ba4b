"""Every function of BasicSR's ``data``, ``metrics`` and ``utils`` runs with the libraries that are installed."""

import importlib
import inspect
import logging
import pkgutil
from collections import OrderedDict
from itertools import chain
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from basicsr.data import degradations

from tlw_basicsr import compat

IMAGE = np.random.default_rng(0).random((48, 64, 3), dtype=np.float32)
BYTES = (255 * IMAGE).astype(np.uint8)
TENSOR = torch.from_numpy(IMAGE.transpose(2, 0, 1))[None]
GREY = np.random.default_rng(1).random((21, 21))
FLOW = np.random.default_rng(2).random((8, 9, 2), dtype=np.float32)
LARGE = np.tile(BYTES, (5, 4, 1))
KERNELS = ["iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso"]
OPT = {"name": "n", "path": {"log": "log", "resume_state": "5.state", "models": "m"}, "network_g": {}, "dist": False}
PAIR = {"folders": ["lq", "gt"], "keys": ["lq", "gt"]}

# what a parameter of a name gets; in a folder with im.png, lq/ and gt/ of images and gt.lmdb
GIVEN = {
    "img": IMAGE, "img2": IMAGE[::-1], "imgs": [IMAGE, IMAGE], "x": TENSOR, "tensor": TENSOR, "block": GREY - 0.5,
    "crop_border": 2, "mu1": np.zeros(8), "sigma1": np.eye(8), "mu2": np.ones(8), "sigma2": 2 * np.eye(8),
    "kernel_size": 7, "sig_x": 2, "sig_y": 1, "theta": 0.3, "beta": 2, "cutoff": 1.5, "grid": degradations.mesh_grid(7)[0],
    "sigma_matrix": degradations.sigma_matrix2(1, 2, 0.3), "d_matrix": degradations.sigma_matrix2(1, 2, 0.3),
    "sigma_x_range": (0.6, 5), "sigma_y_range": (0.6, 5), "rotation_range": (-3, 3), "beta_range": (1, 4),
    "noise_range": (0.5, 1.5), "gray_prob": 0.5, "scale_range": (0.1, 1), "quality_range": (50, 90),
    "flow": FLOW / 99, "arr": FLOW, "min_val": 0, "max_val": 1, "levels": 255, "dx": BYTES[..., 0], "dy": BYTES[..., 1],
    "folder": "gt", "path": "two.txt", "pattern": r"iter: (\d+) value: ([\d.]+)", "dir_path": "gt", "log_dir": "tb",
    "size": 12345, "seed": 1, "func": len, "values": [1, 2, 3], "smooth_weight": 0.5, "angle": 30,
}  # fmt: skip
# what else a function gets, or several times
MORE = {
    "read_img_seq": {"path": "gt", "scale": 2},
    "generate_frame_indices": [
        {"crt_idx": 0, "max_frame_num": 9, "num_frames": 5, "padding": way}
        for way in ("replicate", "reflection", "reflection_circle", "circle")
    ],
    "paired_paths_from_lmdb": {**PAIR, "folders": ["gt.lmdb", "gt.lmdb"]},
    "paired_paths_from_meta_info_file": {**PAIR, "meta_info_file": "meta.txt", "filename_tmpl": "{}"},
    "paired_paths_from_folder": {**PAIR, "filename_tmpl": "{}"},
    "paths_from_lmdb": {"folder": "gt.lmdb"},
    "duf_downsample": [{}, {"x": TENSOR[None], "kernel_size": 13, "scale": 2}],
    "random_mixed_kernels": [{"kernel_list": [kind], "kernel_prob": [1], "kernel_size": 21} for kind in KERNELS],
    "circular_lowpass_kernel": [{}, {"pad_to": 21}],
    "add_jpg_compression": [{"quality": 90}, {"quality": 89.7}, {"quality": np.float64(50)}],
    "mod_crop": {"scale": 5},
    "paired_random_crop": [
        {"img_gts": gt, "img_lqs": lq, "gt_patch_size": 16, "scale": 4}
        for gt, lq in ((IMAGE, IMAGE[::4, ::4]), (TENSOR, TENSOR[..., ::4, ::4]))
    ],
    "augment": [{}, {"flows": [FLOW], "imgs": [IMAGE]}],
    "niqe": {
        "img": np.tile(255 * GREY, (10, 10)), "mu_pris_param": np.zeros((1, 36)), "cov_pris_param": np.eye(36),
        "gaussian_window": np.full((7, 7), 1 / 49),
    },
    "calculate_niqe": {"img": LARGE},
    "reorder_image": {"img": IMAGE.transpose(2, 0, 1), "input_order": "CHW"},
    "calculate_metric": {"data": {"img": BYTES, "img2": BYTES[::-1]}, "opt": {"type": "calculate_psnr", "crop_border": 2}},
    "mkdir_and_rename": {"path": "new"},
    "make_exp_dirs": {"opt": {"is_train": False, "path": {"results_root": "results", "visualization": "results/v"}}},
    "scandir": {"suffix": ".png"},
    "check_resume": {"opt": {**OPT, "path": dict(OPT["path"])}, "resume_iter": 5},
    "flowwrite": [{"filename": "flows/b.flo", "quantize": False}, {"filename": "flows/b.jpg", "quantize": True}],
    "flowread": [{"flow_path": "flows/a.flo", "quantize": False}, {"flow_path": "flows/a.jpg", "quantize": True}],
    "read_data_from_txt_1v": {"pattern": r"value: ([\d.]+)"},
    "quality_to_factor": [{"quality": 30}, {"quality": 80}],
    "cubic": {"x": torch.linspace(-2, 2, 9)},
    "calculate_weights_indices": {
        "in_length": 16, "out_length": 4, "scale": 0.25, "kernel": "cubic", "kernel_width": 4, "antialiasing": True,
    },
    "imresize": [
        {"img": image, "scale": scale, "antialiasing": scale < 0.5}
        for image, scale in ((IMAGE, 0.25), (TENSOR[0], 2), (IMAGE[..., 0], 0.5))
    ],
    "img2tensor": [{}, {"imgs": [IMAGE.astype(np.float64), BYTES]}],
    "tensor2img": [{}, {"tensor": [TENSOR[0], TENSOR[0, 0]]}],
    "imfrombytes": [{"content": None, "flag": flag} for flag in ("color", "grayscale", "unchanged")],
    "imwrite": {"img": BYTES, "file_path": "folder/out.png"},
    **{name: [{}, {"img": BYTES}] for name in ("rgb2ycbcr", "bgr2ycbcr", "ycbcr2rgb", "ycbcr2bgr")},
    "dict2str": {"opt": OrderedDict(a=1, b={"c": 2})},
    "copy_opt_file": {"opt_file": "opt.yml", "experiments_root": "gt"},
    "make_lmdb_from_imgs": {"data_path": "gt", "lmdb_path": "new.lmdb", "img_path_list": ["im.png"], "keys": ["im"], "multiprocessing_read": False},
    "read_img_worker": {"path": "im.png", "key": "im", "compress_level": 1},
    "get_root_logger": {"logger_name": "other", "log_level": logging.INFO, "log_file": "log.txt"},
    "filter2D": [{"img": TENSOR.repeat(n, 1, 1, 1), "kernel": torch.ones(n, 5, 5) / 25} for n in (1, 2)],
    "get_confirm_token": {"response": type("R", (), {"cookies": {"download_warning_x": "1"}})},
}  # fmt: skip
# need a network, processes or a service; the loaders are tested in the trainings
ELSEWHERE = {
    *{"load_patched_inception_v3", "extract_inception_features", "read_data_from_tensorboard", "init_wandb_logger"},
    *{"download_file_from_google_drive", "save_response_content", "load_file_from_url", "init_dist", "parse_options"},
    *{"build_dataset", "build_dataloader", "worker_init_fn"},
    "fused_leaky_relu",  # in test_compat
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with what the functions read."""
    from basicsr.utils.flow_util import flowwrite
    from basicsr.utils.lmdb_util import make_lmdb_from_imgs

    path = tmp_path_factory.mktemp("basicsr")
    for name in ("im.png", "lq/im.png", "gt/im.png"):
        (path / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path / name), BYTES)
    (path / "flows").mkdir()
    for name, quantize in (("a.flo", False), ("a.jpg", True)):
        flowwrite(FLOW / 99, str(path / "flows" / name), quantize=quantize)
    (path / "meta.txt").write_text("im.png (48,64,3)\n")
    (path / "two.txt").write_text("iter: 1 value: 2.5\niter: 2 value: 3.5\n")
    (path / "opt.yml").write_text("name: a\n")
    make_lmdb_from_imgs(str(path / "gt"), str(path / "gt.lmdb"), ["im.png"], ["im"])
    return path


def functions():
    """Those of the three packages' modules, and ours that take the place of some."""
    for package in ("data", "metrics", "utils"):
        whole = importlib.import_module(f"basicsr.{package}")
        for info in [*pkgutil.iter_modules(whole.__path__, f"basicsr.{package}."), None]:
            module = importlib.import_module(info.name) if info else whole
            own = inspect.getmembers(module, inspect.isfunction)
            yield from ((name, f) for name, f in own if f.__module__ == module.__name__ and name[0] != "_")
    yield from ((name.rpartition(".")[2], pkgutil.resolve_name(name)) for name in compat.REPLACED)


def calls(function, arguments):
    """The arguments with every switch as it is by default, and each the other way."""
    parameters = inspect.signature(function).parameters
    named = {name: value for name, value in GIVEN.items() if name in parameters}
    if function.__name__.endswith("_pt"):
        named |= {name: TENSOR for name in ("img", "img2") if name in parameters}
    yield named | arguments
    for name, parameter in parameters.items():
        if isinstance(parameter.default, bool) and name not in arguments:
            yield named | arguments | {name: not parameter.default}


FUNCTIONS = [pytest.param(name, function, id=name) for name, function in functions() if name not in ELSEWHERE]


@pytest.mark.parametrize(("name", "function"), FUNCTIONS)
def test_it_runs(folder, monkeypatch, name, function):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["train"])
    more = MORE.get(name, {})
    more = more if isinstance(more, list) else [more]
    for arguments in chain.from_iterable(calls(function, each) for each in more):
        if name == "imfrombytes":
            arguments["content"] = Path("im.png").read_bytes()
        result = function(**arguments)
        for value in result if isinstance(result, list | tuple) else [result]:
            if isinstance(value, float | np.ndarray | torch.Tensor):
                assert np.isfinite(np.asarray(value)).all()


def test_a_jpeg_is_that_of_opencv():
    for quality, whole in ((73.9, 73), (10, 10)):
        content = cv2.imencode(".jpg", np.rint(255 * IMAGE).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, whole])[1]
        result = degradations.add_jpg_compression(1.0 * IMAGE, quality)
        assert result.dtype == np.float32 and np.array_equal(result, cv2.imdecode(content, 1) / np.float32(255))


def test_classes_of_images(folder):
    from basicsr.utils import DiffJPEG, FileClient, USMSharp

    for differentiable in (False, True):
        image = TENSOR.clone().requires_grad_()
        result = DiffJPEG(differentiable=differentiable)(image, quality=torch.tensor([70.0]))
        assert result.shape == TENSOR.shape and (result - TENSOR).abs().mean() < 0.3
        assert DiffJPEG(differentiable=differentiable)(image[..., :33, :35], quality=40).shape[-2:] == (33, 35)
    assert USMSharp(radius=5)(TENSOR).shape == TENSOR.shape
    content = FileClient("disk").get(str(folder / "im.png"), "gt")
    database = FileClient("lmdb", db_paths=[str(folder / "gt.lmdb")], client_keys=["gt"])
    assert np.array_equal(*(cv2.imdecode(np.frombuffer(c, np.uint8), 1) for c in (content, database.get("im", "gt"))))
