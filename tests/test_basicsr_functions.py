"""Every function of BasicSR's ``data``, ``metrics`` and ``utils`` runs with the libraries that are installed."""

import importlib
import inspect
import logging
import pkgutil
from collections import OrderedDict
from pathlib import Path

import basicsr
import cv2
import numpy as np
import pytest
import torch
from basicsr.data import degradations

from tests.conftest import ROOT

IMAGE = np.random.default_rng(0).random((48, 64, 3), dtype=np.float32)
BYTES = (255 * IMAGE).astype(np.uint8)
TENSOR = torch.from_numpy(IMAGE.transpose(2, 0, 1))[None]
GREY = np.random.default_rng(1).random((21, 21))
KERNELS = ["iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso"]
GRID = degradations.mesh_grid(7)[0]
SIGMA = degradations.sigma_matrix2(1, 2, 0.3)
FLOW = np.random.default_rng(2).random((8, 9, 2), dtype=np.float32)
STEP = {"sig_x": 2, "sig_y": 1, "theta": 0.3}
RANGES = ((0.6, 5), (0.6, 5), (-3, 3))
OPT = {"name": "n", "path": {"log": "log", "resume_state": "5.state", "models": "m"}, "network_g": {}, "dist": False}
LAYERS = {"sigma_range": (1, 2), "gray_prob": 1}

# module: {function: arguments, or a list of several}; in a folder with im.png, lq/ and gt/ of images and gt.lmdb
CALLS = {
    "data.data_util": {
        "read_img_seq": [("gt",), ("gt", True, 2, True)],
        "generate_frame_indices": [
            (0, 9, 5, way) for way in ("replicate", "reflection", "reflection_circle", "circle")
        ],
        "paired_paths_from_lmdb": (["gt.lmdb", "gt.lmdb"], ["lq", "gt"]),
        "paired_paths_from_meta_info_file": (["lq", "gt"], ["lq", "gt"], "meta.txt", "{}"),
        "paired_paths_from_folder": (["lq", "gt"], ["lq", "gt"], "{}"),
        "paths_from_folder": ("gt",),
        "paths_from_lmdb": ("gt.lmdb",),
        "generate_gaussian_kernel": (),
        "duf_downsample": [(TENSOR,), (TENSOR[None], 13, 2)],
    },
    "data.degradations": {
        "sigma_matrix2": (1, 2, 0.3),
        "mesh_grid": (7,),
        "pdf2": (SIGMA, GRID),
        "cdf2": (SIGMA, GRID),
        "bivariate_Gaussian": [(7, 1, 2, 0.3), (7, 1, 2, 0.3, None, False)],
        "bivariate_generalized_Gaussian": [(7, 1, 2, 0.3, 2), (7, 1, 2, 0.3, 2, None, False)],
        "bivariate_plateau": [(7, 1, 2, 0.3, 2), (7, 1, 2, 0.3, 2, None, False)],
        "random_bivariate_Gaussian": [(7, *RANGES, (0.5, 1.5)), (7, *RANGES, None, False)],
        "random_bivariate_generalized_Gaussian": [
            (7, *RANGES, (0.5, 4), (0.5, 1.5)),
            (7, *RANGES, (0.5, 4), None, False),
        ],
        "random_bivariate_plateau": [(7, *RANGES, (1, 4), (0.5, 1.5)), (7, *RANGES, (1, 4), None, False)],
        "random_mixed_kernels": [([kind], [1]) for kind in KERNELS],
        "circular_lowpass_kernel": [(1.5, 7), (1.5, 7, 21)],
        "generate_gaussian_noise": [(IMAGE,), (IMAGE, 10, True)],
        "add_gaussian_noise": [
            (IMAGE, 10, *flags) for flags in ((True, True), (True, False), (False, True), (False, False))
        ],
        "generate_gaussian_noise_pt": [(TENSOR,), (TENSOR, torch.tensor([10.0]), torch.tensor([1.0]))],
        "add_gaussian_noise_pt": (TENSOR,),
        "random_generate_gaussian_noise": (IMAGE, (0, 10), 0.5),
        "random_add_gaussian_noise": [(IMAGE, (0, 10), 0.5), (IMAGE, (0, 10), 0.5, True, True)],
        "random_generate_gaussian_noise_pt": (TENSOR, (0, 10), 0.5),
        "random_add_gaussian_noise_pt": (TENSOR, (0, 10), 0.5),
        "generate_poisson_noise": [(IMAGE,), (IMAGE, 1.0, True)],
        "add_poisson_noise": (IMAGE,),
        "generate_poisson_noise_pt": [(TENSOR,), (TENSOR, torch.tensor([1.0]), torch.tensor([1.0]))],
        "add_poisson_noise_pt": (TENSOR,),
        "random_generate_poisson_noise": (IMAGE, (0.1, 1), 0.5),
        "random_add_poisson_noise": (IMAGE, (0.1, 1), 0.5),
        "random_generate_poisson_noise_pt": (TENSOR, (0.1, 1), 0.5),
        "random_add_poisson_noise_pt": (TENSOR, (0.1, 1), 0.5),
        "add_jpg_compression": [(IMAGE, 90), (IMAGE, 89.7), (IMAGE, np.float64(50))],
        "random_add_jpg_compression": (IMAGE, (50, 90)),
    },
    "data.transforms": {
        "mod_crop": (IMAGE, 5),
        "paired_random_crop": [(IMAGE, IMAGE[::4, ::4], 16, 4), (TENSOR, TENSOR[..., ::4, ::4], 16, 4)],
        "augment": [(IMAGE,), ([IMAGE], True, True, [FLOW], True)],
        "img_rotate": (IMAGE, 30),
    },
    "metrics.niqe": {
        "estimate_aggd_param": (GREY - 0.5,),
        "compute_feature": (GREY - 0.5,),
        "niqe": (np.tile(255 * GREY, (10, 10)), np.zeros((1, 36)), np.eye(36), np.full((7, 7), 1 / 49)),
        "calculate_niqe": (np.tile(BYTES, (5, 4, 1)), 2),
    },
    "metrics.metric_util": {"reorder_image": (IMAGE.transpose(2, 0, 1), "CHW"), "to_y_channel": (BYTES,)},
    "metrics.psnr_ssim": {
        "calculate_psnr": [(BYTES, BYTES[::-1], 2), (BYTES, BYTES[::-1], 2, "HWC", True)],
        "calculate_psnr_pt": [(TENSOR, TENSOR.flip(2), 2), (TENSOR, TENSOR.flip(2), 2, True)],
        "calculate_ssim": [(BYTES, BYTES[::-1], 2), (BYTES, BYTES[::-1], 2, "HWC", True)],
        "calculate_ssim_pt": [(TENSOR, TENSOR.flip(2), 2), (TENSOR, TENSOR.flip(2), 2, True)],
    },
    "metrics.fid": {"calculate_fid": (np.zeros(8), np.eye(8), np.ones(8), 2 * np.eye(8))},
    "metrics": {
        "calculate_metric": ({"img": BYTES, "img2": BYTES[::-1]}, {"type": "calculate_psnr", "crop_border": 2}),
    },
    "utils.misc": {
        "set_random_seed": (1,),
        "get_time_str": (),
        "mkdir_and_rename": ("new",),
        "make_exp_dirs": ({"is_train": False, "path": {"results_root": "results", "visualization": "results/v"}},),
        "scandir": ("gt", ".png", True, True),
        "check_resume": ({**OPT, "path": dict(OPT["path"])}, 5),
        "sizeof_fmt": (12345,),
    },
    "utils.flow_util": {
        "flowwrite": [(FLOW, "flows/a.flo"), (FLOW / 99, "flows/a.jpg", True)],
        "flowread": [("flows/a.flo",), ("flows/a.jpg", True)],
        "quantize_flow": (FLOW,),
        "dequantize_flow": (BYTES[..., 0], BYTES[..., 1]),
        "quantize": (FLOW, 0, 1, 255),
        "dequantize": (BYTES, 0, 1, 255),
    },
    "utils.plot_util": {
        "read_data_from_txt_2v": ("two.txt", r"iter: (\d+) value: ([\d.]+)"),
        "read_data_from_txt_1v": ("two.txt", r"value: ([\d.]+)"),
        "smooth_data": ([1, 2, 3], 0.5),
    },
    "utils.diffjpeg": {"diff_round": (TENSOR,), "quality_to_factor": [(30,), (80,)]},
    "utils.matlab_functions": {
        "cubic": (torch.linspace(-2, 2, 9),),
        "calculate_weights_indices": (16, 4, 0.25, "cubic", 4, True),
        "imresize": [(IMAGE, 0.25), (TENSOR[0], 2), (IMAGE[..., 0], 0.5, False)],
    },
    "utils.img_util": {
        "img2tensor": [(IMAGE,), ([IMAGE.astype(np.float64), BYTES],)],
        "tensor2img": [(TENSOR,), ([TENSOR[0], TENSOR[0, 0]], True, np.uint8, (0, 1))],
        "tensor2img_fast": (TENSOR,),
        "imfrombytes": [(None, flag, True) for flag in ("color", "grayscale", "unchanged")],
        "imwrite": (BYTES, "folder/out.png"),
        "crop_border": ([IMAGE, IMAGE], 2),
    },
    "utils.color_util": {name: [(IMAGE,), (BYTES,)] for name in ("rgb2ycbcr", "bgr2ycbcr", "ycbcr2rgb", "ycbcr2bgr")}
    | {"rgb2ycbcr_pt": [(TENSOR,), (TENSOR, True)]},
    "utils.options": {
        "ordered_yaml": (),
        "dict2str": (OrderedDict(a=1, b={"c": 2}),),
        "copy_opt_file": ("opt.yml", "gt"),
    },
    "utils.dist_util": {"get_dist_info": (), "master_only": (len,)},
    "utils.lmdb_util": {
        "make_lmdb_from_imgs": ("gt", "new.lmdb", ["im.png"], ["im"]),
        "read_img_worker": ("im.png", "im", 1),
    },
    "utils.logger": {
        "init_tb_logger": ("tb",),
        "get_root_logger": ("other", logging.INFO, "log.txt"),
        "get_env_info": (),
    },
    "utils.img_process_util": {
        "filter2D": [(TENSOR, torch.ones(1, 5, 5) / 25), (TENSOR.repeat(2, 1, 1, 1), torch.ones(2, 5, 5) / 25)],
        "usm_sharp": (IMAGE,),
    },
    "utils.download_util": {"get_confirm_token": (type("R", (), {"cookies": {"download_warning_x": "1"}}),)},
}
# need a network, processes or a service; the loaders are tested in the trainings
ELSEWHERE = {
    *{"load_patched_inception_v3", "extract_inception_features", "read_data_from_tensorboard", "init_wandb_logger"},
    *{"download_file_from_google_drive", "save_response_content", "load_file_from_url", "init_dist", "parse_options"},
    *{"build_dataset", "build_dataloader", "worker_init_fn"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with what the functions read."""
    from basicsr.utils.lmdb_util import make_lmdb_from_imgs

    path = tmp_path_factory.mktemp("basicsr")
    for name in ("im.png", "lq/im.png", "gt/im.png"):
        (path / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path / name), BYTES)
    (path / "flows").mkdir()
    (path / "meta.txt").write_text("im.png (48,64,3)\n")
    (path / "two.txt").write_text("iter: 1 value: 2.5\niter: 2 value: 3.5\n")
    (path / "opt.yml").write_text("name: a\n")
    make_lmdb_from_imgs(str(path / "gt"), str(path / "gt.lmdb"), ["im.png"], ["im"])
    return path


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, calls in CALLS.items() for name in calls])
def test_it_runs(folder, monkeypatch, module, name):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["train"])
    function, given = getattr(importlib.import_module(f"basicsr.{module}"), name), CALLS[module][name]
    for arguments in given if isinstance(given, list) else [given]:
        content = Path("im.png").read_bytes()
        result = function(
            *(content if argument is None and name == "imfrombytes" else argument for argument in arguments)
        )
        for value in result if isinstance(result, list | tuple) else [result]:
            if isinstance(value, float | np.ndarray | torch.Tensor):
                assert np.isfinite(np.asarray(value)).all()


def test_none_is_left_out():
    if ROOT in Path(basicsr.__file__).parents:
        pytest.skip("a fork")
    for package in ("data", "metrics", "utils"):
        whole = importlib.import_module(f"basicsr.{package}")
        for info in [*pkgutil.iter_modules(whole.__path__, f"basicsr.{package}."), None]:
            module = importlib.import_module(info.name) if info else whole
            called = CALLS.get(module.__name__.removeprefix("basicsr."), {})
            own = {n for n, f in inspect.getmembers(module, inspect.isfunction) if f.__module__ == module.__name__}
            assert not {n for n in own if n[0] != "_"} - called.keys() - ELSEWHERE, module.__name__


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
