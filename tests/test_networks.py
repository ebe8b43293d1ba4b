"""Files of networks: BasicSR's format, bare state dicts, safetensors, and what part of them fits."""

import pytest
import torch
from basicsr.archs import build_network
from safetensors.torch import save_file

from tests.conftest import plain_options, tiny_options, write_yaml
from tests.helpers import log_text, same, write
from tlw_basicsr import TLWWeightNet, UserError
from tlw_basicsr.networks import load_network, read_network
from tlw_basicsr.util.files import load_file

EDSR = {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 4, "num_block": 1, "upscale": 2}


@pytest.fixture
def files(tmp_path):
    """The same network as a bare state dict, as safetensors, and in BasicSR's format."""
    state = build_network(dict(EDSR)).state_dict()
    torch.save(state, tmp_path / "bare.pth")
    save_file(state, tmp_path / "net.safetensors")
    torch.save({"params": state}, tmp_path / "net.pth")
    return state, [tmp_path / name for name in ("bare.pth", "net.safetensors", "net.pth")]


@pytest.mark.parametrize("param_key", ["params", "params_ema", "other"])
def test_every_format_is_read_whatever_the_entry(files, param_key):
    state, paths = files
    for path in paths:
        assert same(dict(read_network(path, param_key, "x")), dict(state))
    assert read_network(paths[0], None, "x").keys() == state.keys()


@pytest.mark.parametrize("model", [plain_options, tiny_options])
@pytest.mark.parametrize("number", [0, 1])
def test_a_training_with_ema_starts_from_every_format(photographs, train, files, model, number):
    """BasicSR asks for ``params_ema`` for its second network, which neither has."""
    state, paths = files
    path = {"pretrain_network_g": str(paths[number]), "param_key_g": None}
    folder = train(
        model(photographs, path=path, train__total_iter=1, train__optim_g__lr=1e-12, datasets__val=..., val=...)
    )
    saved = load_file(folder / "models/net_g_latest.pth", "")
    for entry in ("params", "params_ema"):
        assert all(torch.allclose(saved[entry][name], state[name], atol=1e-6) for name in state)


def test_programs_take_every_format(files, script, tmp_path):
    yaml = write_yaml(tmp_path, {"scale": 2, "network_g": EDSR}, "net.yml")
    write(tmp_path / "in/a.png", 32)
    results = []
    for number, path in enumerate(files[1]):
        for name, *arguments in (
            ("inference.py", "in", "--out", f"o{number}"),
            ("evaluate.py", "--gt", "in", "--scale", 2),
            ("export.py", f"again{number}.safetensors"),
        ):
            script(name, *arguments, "--opt", yaml, "--checkpoint", path)
        results.append((tmp_path / f"o{number}/a.png").read_bytes())
    assert results[0] == results[1] == results[2]
    assert read_network(tmp_path / "again1.safetensors", "params", "x").keys() == files[0].keys()


def test_a_cut_safetensors_file_is_one_line(files, tmp_path):
    content = files[1][1].read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"x: .*cut\.safetensors is no readable checkpoint"):
        read_network(tmp_path / "cut.safetensors", "params", "x")


def test_a_variance_below_0_is_refused(tmp_path):
    state = TLWWeightNet(num_feat=4).state_dict()
    state["conv.4.running_var"][1] = -0.5
    torch.save({"params": state}, tmp_path / "net_w.pth")
    with pytest.raises(UserError, match=r"net_w.pth: conv.4.running_var has values below 0, which no variance is"):
        load_network({"type": "TLWWeightNet", "num_feat": 4}, tmp_path / "net_w.pth", key="network_w")


def test_what_does_not_fit_is_reported(photographs, train, tmp_path):
    """8 → 4 features: one bias of the last layer fits; BasicSR names the others, too."""
    wide = build_network({**EDSR, "num_feat": 8})
    torch.save({"params": wide.state_dict() | {"more": torch.zeros(1)}}, tmp_path / "wide.pth")
    path = {"pretrain_network_g": str(tmp_path / "wide.pth"), "strict_load_g": False}
    log = log_text(train(plain_options(photographs, path=path, train__total_iter=1, datasets__val=..., val=...)))
    message = "1 of 12 tensors of EDSR are loaded; of another shape: conv_first.weight (8, 3, 3, 3), not (4, 3, 3, 3)"
    assert message in log and "; not in the network: more." in log
