"""A network trained here is an ordinary file: BasicSR's own code and spandrel read it."""

import torch
from basicsr.archs import build_network
from basicsr.models.sr_model import SRModel
from spandrel import ModelLoader

from tests.conftest import as_tensor, photograph, tiny_options

# spandrel knows RRDBNet with num_grow_ch 32, the published one
RRDB = {
    "type": "RRDBNet",
    "num_in_ch": 3,
    "num_out_ch": 3,
    "num_feat": 8,
    "num_block": 1,
    "num_grow_ch": 32,
    "scale": 4,
}


def test_an_rrdb_trained_with_tlw_loads_in_spandrel_and_in_basicsr(photographs, train):
    opt = tiny_options(photographs, scale=4, network_g=RRDB, train__total_iter=2, train__ema_decay=0)
    path = train(opt) / "models/net_g_latest.pth"

    net = build_network(RRDB)
    SRModel.load_network(SRModel.__new__(SRModel), net, str(path))  # BasicSR's own loading code
    net.eval()
    descriptor = ModelLoader().load_from_file(str(path))
    assert descriptor.architecture.id == "ESRGAN"
    assert descriptor.scale == 4
    image = as_tensor(photograph(height=32, width=48))
    with torch.no_grad():
        assert torch.allclose(descriptor.model.eval()(image), net(image), atol=1e-6)
