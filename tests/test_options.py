"""Options: what BasicSR makes of them, and every bad input in one line that names the key."""

import re
import sys
import time
from contextlib import suppress
from functools import reduce
from operator import getitem

import pytest
import torch
from basicsr.archs import build_network
from basicsr.models.sr_model import SRModel
from basicsr.utils.options import parse_options as basicsr_parse_options
from basicsr.utils.registry import MODEL_REGISTRY

from tests.bad_input import TEXTS, places
from tests.conftest import control_options, plain_options, set_option, tiny_options, write_yaml
from tests.helpers import check_all, refused, same, write, write_pairs
from tlw_basicsr import UserError
from tlw_basicsr.engine.options import parse_options
from tlw_basicsr.util.yaml_options import force_options, load_yaml


def parse(tmp_path, opt, *arguments, is_train=True):
    return parse_options(str(tmp_path), is_train, ["-opt", str(write_yaml(tmp_path, opt)), *arguments])[0]


@pytest.mark.parametrize("is_train", [True, False])
def test_the_options_are_what_basicsr_makes_of_them(photographs, tmp_path, monkeypatch, is_train):
    opt = tiny_options(photographs)
    if not is_train:
        opt["datasets"] = {"test_1": opt["datasets"]["val"]}
    path = write_yaml(tmp_path, opt)
    forced = ["--force_yml", "train:ema_decay=0.5", "val:metrics=none", "name=other", "scale=2"]
    monkeypatch.setattr(sys, "argv", ["train.py", "-opt", str(path), *forced])
    theirs = basicsr_parse_options(str(tmp_path), is_train)[0]
    # a bar only on a terminal, and val.suffix may be left out
    theirs["val"] |= {"pbar": False} if is_train else {"pbar": False, "suffix": None}
    assert same(parse(tmp_path, opt, *forced, is_train=is_train), theirs)


def cosine(periods, weights=...):
    given = {} if weights is ... else {"restart_weights": weights}
    return {"type": "CosineAnnealingRestartLR", "periods": periods, "eta_min": 0, **given}


# fmt: off
# place, value, what the message has
IN_THE_FILE = [  # which an editor sees too, by the JSON schema
    ("name", ..., "name: missing"),
    ("name", "../outside", "name: expected a plain folder name"),
    ("model_type", "TLWModl", "model_type: 'TLWModl' is not registered (did you mean TLWModel?)"),
    ("base_model", "SwinModel", "base_model: 'SwinModel' is not registered"),
    ("scale", "four", "scale: expected a whole number of at least 1, got 'four'"),
    ("num_gpu", -1, "num_gpu: expected a whole number of at least 0, or auto"),
    ("manual_seed", 1.5, "manual_seed: expected"),
    ("datasets", [], "datasets: expected a section"),
    ("datasets:train:type", "BicubicDataset", "datasets.train.type: 'BicubicDataset' is not registered"),
    ("datasets:train:dataroot", "x", "datasets.train.dataroot: unknown option (did you mean dataroot_"),
    ("datasets:train:gt_size", "big", "datasets.train.gt_size: expected a whole number"),
    ("datasets:train:batch_size_per_gpu", 0, "datasets.train.batch_size_per_gpu: expected a whole number of at least 1"),
    ("datasets:train:use_hflip", "yes please", "datasets.train.use_hflip: expected true or false"),
    ("network_g", ..., "network_g: missing"),
    ("network_g:type", "EDSRR", "network_g.type: 'EDSRR' is not registered (did you mean EDSR?)"),
    ("network_g:num_in_ch", ..., "network_g.num_in_ch: missing"),
    ("network_w:init", "best", "network_w.init: expected one of default, paper"),
    ("train:optim_g", ..., "train.optim_g: missing"),
    ("train:total_iter", ..., "train.total_iter: missing"),
    ("train:ema_decay", 1.5, "train.ema_decay: expected a number in [0, 1)"),
    ("train:pixel_opt:base", "l2", "train.pixel_opt.base: expected one of l1, mse"),
    ("train:pixel_opt:num_sample", 3, "train.pixel_opt.num_sample: unknown option (did you mean num_samples?)"),
    ("train:pixel_opt:num_samples", 0, "train.pixel_opt.num_samples: expected a whole number of at least 1"),
    ("train:pixel_opt:weights", "errors", "train.pixel_opt.weights: expected one of learned, random, error"),
    ("train:pixel_opt:stochastic", 3, "train.pixel_opt.stochastic: expected true or false"),
    ("train:pixel_opt:distance", {"type": "LPIPSDistance", "nets": "vgg"}, "train.pixel_opt.distance.nets: unknown option"),
    ("train:pixel_opt:distance", {"type": "LPIPSDistance", "net": "resnet"}, "distance.net: expected one of vgg, alex, squeeze"),
    ("train:tlw:k_start", 0, "train.tlw.k_start: expected a number in (0, 1), got 0"),
    ("train:tlw:k_end", 1.2, "train.tlw.k_end: expected a number in (0, 1), got 1.2"),
    ("train:tlw:k_decay", -5, "train.tlw.k_decay: expected a number above 0"),
    ("train:tlw:k_unit", "day", "train.tlw.k_unit: expected one of epoch, iter"),
    ("train:tlw:k_stop", 0.9, "train.tlw.k_stop: unknown option"),
    ("val:metrics", {"psnr": {"type": "calculate_psnr"}}, "val.metrics.psnr.crop_border: missing"),
    ("val:metrics", {"p": {"type": "calculate_psnr", "crop_border": 2, "better": "up"}}, "val.metrics.p.better: expected one of"),
    ("logger:print_freq", ..., "logger.print_freq: missing"),
    ("dist_params", {"prot": 1}, "dist_params.prot: unknown option (did you mean port?)"),
    ("train:scheduler:type", ["x"], "train.scheduler.type: expected text, got ['x']"),
    ("train:pixel_opt:distance", {"type": "LPIPSDistance", "weights": 5}, "train.pixel_opt.distance.weights: expected text"),
    ("plugins", 5, "plugins: expected a list of names, or ~, got 5"),
    ("plugins", [5], "plugins: expected a list of names, or ~, got [5]"),
    ("manual_seed", 5_000_000_000, "manual_seed: expected a whole number of at least 0 and at most 4,000,000,000, or ~"),
    ("scale", [["x" * 100] * 100] * 100, "scale: expected a whole number of at least 1, got [['xxx"),
    ("val:val_freq", 2.5, "val.val_freq: expected a whole number above 0, got 2.5"),
    ("logger:print_freq", 0.5, "logger.print_freq: expected a whole number above 0"),
    ("train:warmup_iter", 1.5, "train.warmup_iter: expected a whole number, got 1.5"),
    ("datasets:train:num_worker_per_gpu", 10**6, "num_worker_per_gpu: expected a whole number of at least 0 and at most"),
    ("datasets:train", {"type": "PairedImageDataset", "dataroot_gt": ".", "dataroot_lq": ".", "filename_tmpl": "{0.x}"},
     "datasets.train.filename_tmpl: expected text with one {} and no other braces"),
    ("datasets:train:filename_tmpl", "{}x2", "datasets.train.filename_tmpl: unknown option; accepted are"),
    ("network_g:num_feats", 8, "network_g.num_feats: unknown option (did you mean num_feat?)"),
    ("network_w:prior", "errors", "network_w.prior: expected one of none, error, got 'errors'"),
    ("network_w:type", ..., "network_w.type: missing; accepted are"),
    ("datasets:train:gt_sise", 16, "datasets.train.gt_sise: unknown option (did you mean gt_size?)"),
    ("path:pretrain_network_g", 5, "path.pretrain_network_g: expected text, or ~, got 5"),
    ("path:strict_load", "yes", "path.strict_load: expected true or false, or ~, got 'yes'"),
    ("val:metrics:piq", {"type": "tlw_piq"}, "val.metrics.piq.name: missing"),
    ("train:total_iter", 0, "train.total_iter: expected a whole number above 0, got 0"),
    ("train:use_amp", "fp8", "train.use_amp: expected one of false, bf16, fp16, got 'fp8'"),
    ("train:optim_g:type", ..., "train.optim_g.type: missing; expected text"),
    ("train:tlw:preset", "cheap", "train.tlw.preset: expected one of exact, fast, economy, paper, got 'cheap'"),
    ("train:tlw:use_amp", "fp16", "train.tlw.use_amp: expected one of false, bf16, got 'fp16'"),
    ("val:suffix", "a/b", "val.suffix: expected text without /, or ~, got 'a/b'"),
    ("logger:use_tb_logger", ..., "logger.use_tb_logger: missing; expected true or false"),
    ("logger:keep_checkpoints", 0, "logger.keep_checkpoints: expected a whole number of at least 1, or ~, got 0"),
    ("model_type", "SRModl", "model_type: 'SRModl' is not registered (did you mean SRModel?)"),
    ("model_type", "DATModel", "'DATModel' is not registered; a part of another repository needs plugins"),
    ("network_g", {"type": "DAT"}, "network_g.type: 'DAT' is not registered; a part of another repository needs plugins"),
]
WRONG = [
    *IN_THE_FILE,
    ("base_model", "TLWModel", "base_model: TLWModel is no class that TLW can extend; SRModel is one"),
    ("scale", ..., "scale: missing"),
    ("num_gpu", 99, "num_gpu: 99, but"),
    ("datasets:train", ..., "datasets.train: missing"),
    ("datasets:training", {"type": "BicubicSRDataset"}, "datasets.training: unknown data set"),
    ("datasets:train:dataroot_gt", ..., "datasets.train.dataroot_gt: missing"),
    ("datasets:train:dataroot_gt", "nowhere", "datasets.train.dataroot_gt: nowhere is not a folder"),
    ("datasets:train:gt_size", 15, "datasets.train.gt_size: 15 is not a multiple of the scale 2"),
    ("datasets:train:gt_size", 64, "smaller than the 64×64 needed for gt_size"),
    ("datasets:train:gt_size", ..., "datasets.train.gt_size: missing"),
    ("datasets:train:batch_size_per_gpu", 7, "batch_size_per_gpu: a batch of 7 is more than the 6 images"),
    ("datasets:train:io_backend", {"type": "tape"}, "datasets.train.io_backend.type: expected one of disk, lmdb"),
    ("datasets:train:prefetch_mode", "cuda", "datasets.train.prefetch_mode: cuda needs a GPU"),
    ("datasets:val:mod_crop", 7, "datasets.val.mod_crop: 7 is not a multiple of the scale"),
    ("network_g:num_feat", "many", "; num_feat: expected a number, got 'many'"),
    ("network_g:upscale", 4, "network_g.upscale: 4 does not fit scale: 2"),
    ("network_g:num_feat", -3, "network_g: EDSR fails in building the model (RuntimeError: Trying to create"),
    ("network_w", ..., "network_w: missing"),
    ("train:optim_w", ..., "train.optim_w: missing"),
    ("train:optim_w:lr", "1e-4x", "train.optim_w: Adam fails in building the model (TypeError: '<=' not supported"),
    ("train:optim_w:type", "Adan", "train.optim_w.type: 'Adan' (did you mean Adam?); accepted are ASGD"),
    ("train:optim_g:betta", [0.5, 0.9], "train.optim_g.betta: unknown option (did you mean betas?)"),
    ("train:scheduler:type", "StepLr", "train.scheduler.type: 'StepLr' (did you mean StepLR?); accepted are ChainedSch"),
    ("train:scheduler:milestone", [1], "train.scheduler.milestone: unknown option (did you mean milestones?)"),
    ("train:scheduler:milestones", ..., "train.scheduler.milestones: missing"),
    ("train:pixel_opt", {"type": "L1Loss"}, "train.pixel_opt.type: 'L1Loss'; accepted with model_type: TLWModel is TLWLoss"),
    ("train:pixel_opt", ..., "train.pixel_opt.type: None; accepted with model_type: TLWModel is TLWLoss"),
    ("train:pixel_opt:weights", "error", "network_w: not used with train.pixel_opt.weights: error; delete it"),
    ("train:pixel_opt:distance", {"type": "Nearness"}, "train.pixel_opt.distance.type: 'Nearness' is not registered"),
    ("train:pixel_opt:distance", {"type": "LPIPSDistance", "weights": "no.pth"}, "no.pth does not exist"),
    ("train:pixel_opt:distance", {"type": "SSIMDistance", "kernel_size": 4}, "kernel_size: expected an odd number of at least 3"),
    ("model_type", "SRModel", "train.pixel_opt.type: TLWLoss needs model_type: TLWModel"),
    ("val:metrics", {"psnr": {"type": "calculate_psn", "crop_border": 2}}, "val.metrics.psnr.type: 'calculate_psn'"),
    ("val:val_freq", ..., "val.val_freq: missing"),
    ("val:metrics", {"p": {"type": "calculate_psnr", "crop_border": 2, "test_y_chanel": True}}, "(did you mean test_y_channel?)"),
    ("path:pretrain_network_g", "none.pth", "path.pretrain_network_g: none.pth is not a file"),
    ("path:resume_state", "none.state", "path.resume_state: none.state is not a file"),
    ("train:pixel_opt:distance", {"type": "L1Loss"}, "train.pixel_opt: TLWLoss fails in the first iteration ("),
    ("train:tlw:weight_crop", 1, "; train.tlw.weight_crop: 1"),
    ("train:pixel_opt:distance", {"type": "SSIMDistance", "kernel_size": 33}, "distance: SSIMDistance fails in the first iter"),
    ("val:metrics", {"p": {"type": "calculate_psnr", "crop_border": "4"}}, "val.metrics.p: calculate_psnr fails in the val"),
    ("val:metrics", {"p": {"type": "calculate_psnr", "crop_border": 2, "input_order": "XYZ"}}, "val.metrics.p: calculate_psnr"),
    ("datasets:train:persistent_workers", True, "persistent_workers: true needs num_worker_per_gpu"),
    ("datasets:train:gt_size", None, "gt_size: ~ with more than one image in a batch needs images of one size"),
    ("plugins", ["no_such_plugin"], "plugins: no_such_plugin can't be imported"),
    ("plugins", ["../x"], "plugins: '../x' is not the name of a module"),
    ("scale", 2**2000, "it has a number of more than 300 digits"),
    ("network_g:upscale", ..., "network_g.upscale: missing, and EDSR's default of 4 does not fit scale: 2"),
    ("network_g:num_in_ch", 1, "network_g: EDSR fails in the first iteration (RuntimeError: Given groups=1"),
    ("network_g:num_in_ch", 4, "; images: lq (2, 3, 8, 8), gt (2, 3, 16, 16)"),
    ("network_g", {"type": "RRDBNet", "num_in_ch": 3, "num_out_ch": 1, "scale": 2, "num_feat": 4, "num_block": 1},
     "network_g: RRDBNet gives (2, 1, 16, 16) where the HR image is (2, 3, 16, 16); images: lq (2, 3, 8, 8)"),
    ("network_g", {"type": "SwinIR", "img_size": 8, "window_size": 5, "embed_dim": 6, "depths": [1], "num_heads": [1],
                   "upscale": 2, "upsampler": "pixelshuffledirect"}, "network_g: SwinIR fails in the first iteration"),
    ("train:scheduler", cosine(8), "train.scheduler: CosineAnnealingRestartLR fails in building the model (TypeError"),
    ("train:scheduler", cosine([4, 4], [1]), "same length.); train.scheduler.restart_weights: [1]"),
    ("train:scheduler:milestones", 4, "train.scheduler: MultiStepLR fails in building the model (TypeError"),
    ("train:optim_w:betas", [0.9, 1.5], "train.optim_w: Adam fails in building the model (ValueError: Invalid beta"),
    ("train:scheduler:milestones", [250, 0], "milestones: expected whole numbers, none below the one before it, got [250, 0]"),
    ("train:scheduler:milestones", [2.5], "train.scheduler.milestones: expected whole numbers"),
    ("datasets:train_2", {"type": "BicubicSRDataset"}, "datasets.train_2: a training reads one training set, datasets.train"),
    ("datasets:train:dataroot_gt", "~no-such-user/x", "datasets.train.dataroot_gt: ~no-such-user/x: there is no such home"),
    ("datasets:train:meta_info_file", "/dev/zero", "datasets.train.meta_info_file: /dev/zero is not a regular file"),
    ("path:pretrain_network_g", "~no-such-user/x", "path.pretrain_network_g: ~no-such-user/x: there is no such home"),
    ("path:resume_state", "~no-such-user/x", "path.resume_state: ~no-such-user/x: there is no such home folder"),
    ("datasets:train:dataset_enlarge_ratio", 10**15, "datasets.train.dataset_enlarge_ratio: 1000000000000000 times 6"),
    ("datasets:train:dataset_enlarge_ratio", 10**30, "make an epoch of more than 20,000,000; accepted is at most 3333333"),
    ("val", {"save_img": False, "val_freq": 1, "metrics": {1: {"type": "calculate_psnr", "crop_border": 2}}, "save_best": "p"},
     "val.save_best: p is not in val.metrics; accepted are 1"),
    ("train:optim_g", {"type": "LBFGS", "lr": 1}, "train.optim_g: LBFGS fails in the first iteration (TypeError"),
    ("train:optim_g", {"type": "SparseAdam", "lr": 1}, "train.optim_g: SparseAdam fails in the first iteration (RuntimeError"),
    ("train:optim_g", {"type": "SGD"}, "train.optim_g: SGD fails in building the model (TypeError: TrainingMixin.get_optimizer()"),
    ("train:scheduler", {"type": "ReduceLROnPlateau"}, "train.scheduler: fails in iteration 2 (TypeError: ReduceLROnPlateau.step()"),
    ("train:scheduler", {"type": "CosineAnnealingLR"}, "train.scheduler.T_max: missing"),
    ("train:scheduler", {"type": "LambdaLR", "lr_lambda": "x"}, "train.scheduler: LambdaLR fails in building the model"),
    ("train:scheduler", {"type": "OneCycleLR", "max_lr": 1e-3, "total_steps": 7},
     "train.scheduler.total_steps: it ends after 7 iterations, before train.total_iter: 8"),
    ("train:scheduler", cosine([3, 4], [1, 1]), "7, is less than train.total_iter: 8; make the last one 5, or add one and its"),
    ("train:fft_opt", {"type": "L1Loss"}, "train.fft_opt: SRModel never asks for it, so it would have no effect"),
    ("train:gan_opt", {"type": "GANLoss", "gan_type": "vanilla"}, "train.gan_opt: SRModel never asks for it"),
    ("train:optim_d", {"type": "Adam", "lr": 1e-4}, "train.optim_d: SRModel never asks for it"),
    ("network_d", {"type": "UNetDiscriminatorSN", "num_in_ch": 3}, "network_d: SRModel never asks for it"),
    ("train:perceptual_opt", {"type": "L1Loss", "reduction": "average"}, "train.perceptual_opt: L1Loss fails in building the model (V"),
    ("train:tlw:sync_bn", True, "train.tlw.sync_bn: true needs a distributed training on GPUs"),
    ("base_model", "ESRGANModel", "network_d: missing; it is read in building the model"),
    ("base_model", "RealESRNetModel", "gt_usm: missing; it is read in the first iteration"),
    ("base_model", "StyleGAN2Model", "network_g.num_style_feat: missing; it is read in building the model"),
]
# fmt: on


@pytest.mark.parametrize(("place", "value", "message"), WRONG, ids=[f"{w[0]}={w[1]}"[:60] for w in WRONG])
def test_a_wrong_option_is_one_line_that_names_it(photographs, tmp_path, place, value, message):
    opt = tiny_options(photographs)
    set_option(opt, place, value)
    refused(re.escape(message), check_all, tmp_path, opt)
    assert {p.name for p in tmp_path.iterdir()} == {"options.yml"}


# the right key, and what is given instead
MISSPELT = {
    "name": "nmae",
    "train:total_iter": "train:total_itr",
    "train:ema_decay": "train:ema_deacy",
    "logger:print_freq": "logger:print_frequency",
    "path:pretrain_network_g": "path:pretrain_networkg",
    "path:strict_load_g": "path:strict_loadg",
    "find_unused_parameters": "find_unused_parameter",
}


@pytest.mark.parametrize("right", MISSPELT)
@pytest.mark.parametrize("rehearse", [True, False])
def test_a_misspelt_key_is_one_line_with_the_right_one(photographs, tmp_path, right, rehearse):
    opt = tiny_options(photographs, train__rehearse=rehearse)
    *sections, key = right.split(":")
    section = opt[sections[0]] if sections else opt
    section.pop(key, None)
    set_option(opt, MISSPELT[right], "x")
    wrong = MISSPELT[right].replace(":", ".")
    refused(rf"^{wrong}: unknown option \(did you mean {key}\?\)", check_all, tmp_path, opt)


WINDOWS = {
    "type": "SwinIR", "embed_dim": 6, "depths": [1, 1], "num_heads": [1, 1], "upsampler": "pixelshuffledirect", "upscale": 2,
}  # fmt: skip
HAT = {
    "type": "TLWHAT", "embed_dim": 6, "squeeze_factor": 2, "depths": [1], "num_heads": [1], "num_feat": 4, "upscale": 2,
}  # fmt: skip
FIT = [
    # changes to network_g, gt_size
    ({}, 16),
    ({}, None),
    ({**WINDOWS, "img_size": 8, "window_size": 8}, 16),
    ({**WINDOWS, "img_size": 10, "window_size": 5}, 20),
    (HAT, 16),
    ({"type": "TLWVDSR", "num_feat": 4, "num_block": 1, "upscale": 2}, 16),
]


@pytest.mark.parametrize(("network", "gt_size"), FIT)
@pytest.mark.parametrize("is_train", [True, False])
def test_networks_that_fit_pass_and_random_numbers_begin_anew(photographs, tmp_path, network, gt_size, is_train):
    opt = tiny_options(photographs, datasets__train__gt_size=gt_size, datasets__train__batch_size_per_gpu=1)
    opt["network_g"] = network or opt["network_g"]
    if "window_size" in network:
        opt["base_model"] = "SwinIRModel"  # which pads in validation
    if not is_train:
        opt["datasets"] = {"test": opt["datasets"]["val"]}
    parse(tmp_path, opt, is_train=is_train)
    before = torch.get_rng_state()
    check_all(tmp_path, opt, is_train=is_train)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_plugin_may_feed_its_network_otherwise(photographs, tmp_path, register):
    class FedOtherwiseModel(SRModel):
        def feed_data(self, data):
            super().feed_data(data)
            self.lq = self.lq.expand(-1, 3, -1, -1)

    model = register(MODEL_REGISTRY, FedOtherwiseModel)
    assert check_all(tmp_path, plain_options(photographs, model_type=model)) == []


def test_testing_needs_a_val_section_and_nothing_of_the_training(photographs, tmp_path):
    opt = plain_options(photographs, train=..., logger=...)
    opt["datasets"] = {"test": opt["datasets"]["val"]}
    for more in ({"model_type": "UncertaintyModel"}, {"train": {"pixel_opt": 5, "tlw": 5}}):
        check_all(tmp_path, {**opt, **more}, is_train=False)
    for value in (None, ...):
        set_option(opt, "val", value)
        refused(r"^val: (expected a section|missing)", parse, tmp_path, opt, is_train=False)


@pytest.mark.parametrize("weights", ["random", "error"])
def test_a_control_takes_neither_weighting_network_nor_distance(photographs, tmp_path, weights):
    check_all(tmp_path, control_options(photographs, weights))
    for place, value, message in (
        ("network_w", {"type": "TLWWeightNet"}, "network_w: not used"),
        ("path__pretrain_network_w", "w.pth", "path.pretrain_network_w: not used"),
        ("train__optim_w", {"type": "Adam", "lr": 1e-3}, "train.optim_w: not used"),
        ("train__pixel_opt__distance", {"type": "SSIMDistance"}, "train.pixel_opt.distance: not used"),
        ("train__tlw__k_stop", 0.9, "train.tlw.k_stop: unknown option"),
    ):
        refused(message, parse, tmp_path, control_options(photographs, weights, **{place: value}))
    with pytest.raises(UserError, match="stochastic must be True"):
        check_all(tmp_path, control_options(photographs, "random", train__pixel_opt__stochastic=False))


RIGHT = [
    {},
    {"train__scheduler": cosine([8])},
    {"train__scheduler": cosine([4, 4], [1, 0.5])},
    # what BasicSR takes
    {"train__perceptual_opt": None, "val__suffix": "", "manual_seed": None},
    {"train__optim_g": {"type": "Adam", "lr": 1e-3, "betas": [0, 0.99]}, "path__ignore_resume_networks": "network_w"},
    {"datasets__val__scale": 2},
    {"path": {"strict_load_g": None, "resume_state": None}, "dist_params": {"backend": "nccl", "port": 29500}},
]


@pytest.mark.parametrize("changes", RIGHT)
def test_right_options_pass(photographs, tmp_path, changes):
    check_all(tmp_path, tiny_options(photographs, **changes))


def test_any_misspelt_key_is_found(photographs, tmp_path):
    """One letter more in any key of a right file is an error that names it, or the one that is missing."""
    free = {("datasets", "val"), ("val", "metrics", "psnr")}  # names of the user's choice
    for number, place in enumerate(p for p in places(tiny_options(photographs)) if p not in free):
        opt = tiny_options(photographs)
        misspelt = place[-1] + "xqz"[number % 3]
        set_option(opt, (*place[:-1], misspelt), reduce(getitem, place, opt))
        set_option(opt, place, ...)
        refused(rf"{misspelt}|{place[-1]}(: missing|\.type: None)", check_all, tmp_path, opt)


@pytest.mark.parametrize("name", TEXTS)
def test_files_that_are_no_options_are_refused_and_not_run(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, message = TEXTS[name]
    (tmp_path / "bad.yml").write_text(text)
    named = rf"bad\.yml.*{re.escape(message)}" if message else ""
    refused(named, parse_options, str(tmp_path), True, ["-opt", str(tmp_path / "bad.yml")])
    assert not (tmp_path / "run.txt").exists()


def test_numbers_may_be_written_in_both_ways_but_in_base_10():
    opt = load_yaml("a: 1e-4\nb: !!float 1e-4\nc: 1.5e3\nd: e5\ne: 12\nf: 1e5x", "x")
    assert opt == {"a": 1e-4, "b": 1e-4, "c": 1500.0, "d": "e5", "e": 12, "f": "1e5x"}
    for number in ("060", "-012", "[250,000]", "1:30", "0_1", "1:30.5", "-1:2:3."):
        refused(r"x, line 2: not valid YAML: '.*' is no plain number", load_yaml, f"a: 1\nb: {number}", "x")
        assert load_yaml(f"b: '{number}'", "x") == {"b": number}


def test_long_numbers_are_read_at_once():
    start = time.process_time()
    for text in ("1" * 40_000 + "e", "1" * 40_000 + ".e", "." + "1" * 40_000 + "e", "1:" * 20_000):
        assert load_yaml(f"b: '{text}'", "x")["b"] == text
        with suppress(UserError):
            load_yaml(text, "x")
    assert time.process_time() - start < 3


def test_a_file_of_many_keys_or_merges_is_read_at_once():
    assert len(load_yaml("\n".join(f"k{n}: {n}" for n in range(5000)), "x")) == 5000
    bomb = "a0: &a0 {x: 1, y: 2}\n"
    bomb += "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}], z: {i}}}\n" for i in range(1, 12))
    assert load_yaml(bomb, "x")["a11"] == {"x": 1, "y": 2, "z": 11}
    merged = load_yaml("top: {a: &a {x: 1}, b: &b {<<: *a, x: 2}}\nc: {<<: *b, w: 3}", "x")
    assert merged == {"top": {"a": {"x": 1}, "b": {"x": 2}}, "c": {"x": 2, "w": 3}}


def test_force_yml():
    opt = {"a": {"b": 1}, "c": None}
    force_options(opt, ["a:b=!!float 1e-3", "a:new=[1, 2]", "c=True", "d=none", "e=x=y"])
    assert opt == {"a": {"b": 1e-3, "new": [1, 2]}, "c": True, "d": None, "e": "x=y"}
    wrong = dict.fromkeys(["a", "=5", "a:=5", ":b=5"], "expected key=value")
    wrong |= {"z:b=1": "no section 'z'", "c:b=1": "no section 'c'", "a:b=[": "not valid"}
    for entry, message in wrong.items():
        refused(message, force_options, opt, [entry])


def test_checkpoints_of_another_network_are_named(photographs, tmp_path):
    state = build_network(tiny_options(photographs)["network_g"]).state_dict()
    other = {**state, "conv_first.weight": torch.zeros(5, 3, 3, 3)}
    missing = {k: v for k, v in state.items() if k != "conv_last.bias"}
    cases = {
        "ok": ({"params": state}, None),
        "module": ({"params": {f"module.{k}": v for k, v in state.items()}}, None),
        "bare": (state, None),
        "shape": ({"params": other}, "conv_first.weight is (5, 3, 3, 3), not (4, 3, 3, 3)"),
        "missing": ({"params": missing}, "1 tensors missing, 0 unknown (conv_last.bias is missing)"),
        "unknown": ({"params": {**state, "more": torch.zeros(1)}}, "more is not in EDSR"),
        "list": ([1, 2], "must hold a dict"),
        "values": ({"params": {"a": 1}}, "does not hold a network's tensors"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / f"{name}.pth"
        torch.save(content, path)
        opt = tiny_options(photographs, path__pretrain_network_g=str(path))
        if message is None:
            check_all(tmp_path, opt)
            continue
        with pytest.raises(UserError) as error:
            check_all(tmp_path, opt)
        text = str(error.value)
        assert message in text and f"{name}.pth" in text and "path.pretrain_network_g" in text and "\n" not in text


def test_hr_and_lr_must_fit_the_scale(photographs, tmp_path):
    opt = tiny_options(photographs)
    opt["datasets"]["train"] |= write_pairs(tmp_path)
    check_all(tmp_path, opt)
    write(tmp_path / "lq/b.png", 15)
    refused("is 32×32, which is not 2 times the 15×15", check_all, tmp_path, opt)
    (tmp_path / "lq/b.png").rename(tmp_path / "lq/c.png")
    refused("no LR image for", check_all, tmp_path, opt)


PLUGIN = """
from basicsr.utils.registry import DATASET_REGISTRY, MODEL_REGISTRY
from basicsr.models.sr_model import SRModel
from tlw_basicsr import BicubicSRDataset
from noted.helper import read_strength
@DATASET_REGISTRY.register()
class NotedDataset(BicubicSRDataset):
    def __init__(self, opt):
        self.blur = opt.get("blur_sigma", 1)
        super().__init__(opt)
@MODEL_REGISTRY.register()
class NotedModel(SRModel):
    def optimize_parameters(self, current_iter):
        self.strength = read_strength(self.opt["train"])
        super().optimize_parameters(current_iter)
"""


def test_an_option_of_a_third_party_that_nothing_reads_is_noted(photographs, tmp_path, monkeypatch):
    (tmp_path / "noted").mkdir()
    (tmp_path / "noted/helper.py").write_text('def read_strength(opt):\n    return opt.get("noted_strength")\n')
    (tmp_path / "noted/parts.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    opt = tiny_options(photographs, plugins=["noted.parts"], base_model="NotedModel", train__noted_strength=2)
    opt["datasets"]["train"] |= {"type": "NotedDataset", "blur_sigma": 2}
    assert check_all(tmp_path, opt) == []
    opt["datasets"]["train"]["cuda"] = 1
    opt["train"]["noted_too"] = {"a": 1}
    assert sorted(check_all(tmp_path, opt)) == [
        "datasets.train.cuda: nothing in NotedDataset reads this option",
        "train.noted_too: nothing in NotedModel reads this option",
    ]
    opt["train"]["noted_strenth"] = opt["train"].pop("noted_strength")
    refused(r"train\.noted_strenth: unknown option \(did you mean noted_strength\?\)", check_all, tmp_path, opt)
