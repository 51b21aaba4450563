"""Other libraries on the variants; each test runs where its package is installed (`pip install '.[interop]'`)."""
import json
import shutil
import types

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cpool_vision.hub import save_for_hub
from cpool_vision.layers import ContextPool2d, context_pools
from cpool_vision.profile.fvcore import fvcore_handles
from cpool_vision.retrofit import add_context_pool, save_model

CNN, VIT, NAFLEX = 'resnet_micro_cpool_32', 'vit_micro_cpool_patch4_32', 'naflexvit_micro_cpool_patch4_gap'
SMALL = {CNN: dict(layers=[1, 1, 1, 1]), **dict.fromkeys((VIT, NAFLEX), dict(depth=2, embed_dim=32, num_heads=2))}
pytestmark = pytest.mark.filterwarnings('ignore')


def make(name, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL[name], **kwargs).eval()
    for module in model.modules():
        if isinstance(module, ContextPool2d):  # supports and weights that differ from place to place
            nn.init.normal_(module.reduce.weight, std=.2)
            nn.init.normal_(module.predict.weight, std=.2)
    return model


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('name', [CNN, VIT, NAFLEX])
def test_export_with_any_batch(name, images):
    model = make(name)
    program = torch.export.export(model, (images,), dynamic_shapes={'x': {0: torch.export.Dim('batch', min=1, max=64)}})
    more = torch.randn(5, 3, 32, 32)
    assert torch.equal(program.module()(more), model(more))
    # one node per pool: the backend is chosen where the program runs
    targets = [str(node.target) for node in program.graph.nodes]
    pools = sum(isinstance(m, ContextPool2d) for m in model.modules())
    assert targets.count('cpool_vision.context_pool_layer.default') == pools > 0


@pytest.mark.parametrize('name', [CNN, pytest.param(VIT, marks=pytest.mark.slow), NAFLEX])
def test_onnx_with_any_batch(name, images, tmp_path):
    pytest.importorskip('onnxscript')
    runtime = pytest.importorskip('onnxruntime')
    model = make(name)
    path = tmp_path / 'model.onnx'
    torch.onnx.export(
        model, (images,), str(path), dynamo=True, verbose=False,
        dynamic_shapes={'x': {0: torch.export.Dim('batch', min=1, max=64)}})
    session = runtime.InferenceSession(str(path))
    more = torch.randn(5, 3, 32, 32)
    got, = session.run(None, {session.get_inputs()[0].name: more.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(more), rtol=1e-4, atol=1e-5)


def test_onnx_of_torchscript_graphs_names_the_remedy(images, tmp_path):
    pytest.importorskip('onnx')
    with pytest.raises(RuntimeError, match='context pools are not exported .*pass dynamo=True'):
        torch.onnx.export(make(CNN), (images,), str(tmp_path / 'model.onnx'), dynamo=False)


def test_fvcore_counts_pools():
    nn_count = pytest.importorskip('fvcore.nn')
    model, plain = (timm.create_model(CNN, cpool_positions=p, **SMALL[CNN]).eval() for p in ('branch', 'none'))
    image = torch.zeros(1, 3, 32, 32)
    analysis = nn_count.FlopCountAnalysis(model, image).unsupported_ops_warnings(False)
    blind = analysis.total()
    analysis.set_op_handle(**fvcore_handles())
    pooled = analysis.by_operator()['context_pool2d']
    predictors = sum(pixels * (pool.reduce.weight.numel() + pool.predict.weight.numel())
                     for pixels, pool in zip((8 * 8, 4 * 4), context_pools(model).values(), strict=True))
    assert pooled == 96 * (8 * 8) ** 2 + 128 * (4 * 4) ** 2 and analysis.total() == blind + pooled
    with FlopCounterMode(display=False) as counter:
        model(image)
        plain_counter = counter.get_flop_counts()['Global']
    assert plain_counter[torch.ops.cpool_vision.context_pool_layer_fused] == 2 * (pooled + predictors)
    assert blind == nn_count.FlopCountAnalysis(plain, image).unsupported_ops_warnings(False).total() + predictors
    vit = make(VIT).eval()
    tokens = nn_count.FlopCountAnalysis(vit, image).unsupported_ops_warnings(False)
    pools = sum(isinstance(module, ContextPool2d) for module in vit.modules())
    of_tokens = tokens.set_op_handle(**fvcore_handles()).by_operator()['context_pool2d']
    assert of_tokens == pools * vit.embed_dim * (8 * 8) ** 2 > 0
    assert 'context_pool2d' not in nn_count.FlopCountAnalysis(plain, image).by_operator()


def test_detection_with_a_feature_pyramid():
    from torchvision.models.detection import RetinaNet
    from torchvision.ops import FeaturePyramidNetwork

    class Backbone(nn.Module):
        out_channels = 16

        def __init__(self):
            super().__init__()
            self.body = timm.create_model(
                CNN, features_only=True, out_indices=(2, 3, 4), zero_init_last=False, **SMALL[CNN])
            self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), self.out_channels)

        def forward(self, x):
            return self.fpn({str(i): f for i, f in enumerate(self.body(x))})

    from torchvision.models.detection.anchor_utils import AnchorGenerator
    anchors = AnchorGenerator(sizes=((8,), (16,), (32,)), aspect_ratios=((1.,),) * 3)
    model = RetinaNet(Backbone(), num_classes=3, anchor_generator=anchors, min_size=64, max_size=64)
    target = dict(boxes=torch.tensor([[4., 4., 30., 40.]]), labels=torch.tensor([1]))
    losses = model([torch.rand(3, 64, 64)], [target])
    sum(losses.values()).backward()
    pools = [m for m in model.modules() if isinstance(m, ContextPool2d)]
    assert pools and all(m.reduce.weight.grad.any() for m in pools)
    assert set(model.eval()([torch.rand(3, 64, 64)])[0]) == {'boxes', 'labels', 'scores'}


def test_segmentation_encoders(images, tmp_path):
    smp = pytest.importorskip('segmentation_models_pytorch')
    model = smp.Unet('tu-resnet18_cpool', encoder_weights=None, classes=2, decoder_channels=(32, 16, 16, 8, 8))
    y = model(torch.randn(1, 3, 64, 64))
    assert y.shape == (1, 2, 64, 64)
    y.square().sum().backward()
    assert any(isinstance(m, ContextPool2d) for m in model.encoder.modules())
    # a folder of ours by its timm name, as smp spells it
    save_model(add_context_pool(timm.create_model('test_resnet'), img_size=64), str(tmp_path), force=True)
    folder = smp.Unet(f'tu-local-dir:{tmp_path}', encoder_weights=None, classes=2, encoder_depth=5,
                      decoder_channels=(32, 16, 16, 8, 8))
    assert any(isinstance(m, ContextPool2d) for m in folder.encoder.modules())
    dpt = smp.DPT('tu-vit_tiny_cpool_patch16_224', encoder_weights=None, classes=2, encoder_depth=4,
                  encoder_output_indices=[2, 5, 8, 11], dynamic_img_size=True).eval()
    with torch.no_grad():
        assert dpt(torch.randn(1, 3, 64, 96)).shape == (1, 2, 64, 96)


def test_transformers_backbone_and_wrapper(images, tmp_path):
    pytest.importorskip('transformers')
    from transformers import AutoModelForImageClassification, TimmBackbone, TimmBackboneConfig

    config = TimmBackboneConfig(backbone=CNN, use_pretrained_backbone=False, out_indices=[1, 4])
    backbone = TimmBackbone(config).eval()
    maps = backbone(images).feature_maps
    assert [tuple(m.shape[-2:]) for m in maps] == [(32, 32), (4, 4)]
    assert any(isinstance(m, ContextPool2d) for m in backbone.modules())

    model = make(CNN, num_classes=3)
    save_for_hub(model, tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['architecture'] == CNN and config['num_classes'] == 3
    wrapped = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(wrapped(images).logits, model(images), rtol=1e-4, atol=1e-5)
    # and back: what transformers saves, timm reads
    wrapped.save_pretrained(tmp_path / 'again')
    state = {k.removeprefix('timm_model.'): v for k, v in wrapped.state_dict().items()}
    assert set(state) == set(model.state_dict())


def test_hub_folder_with_another_number_of_classes(images, tmp_path):
    model = make(VIT, num_classes=7)
    save_for_hub(model, tmp_path)
    assert (tmp_path / 'model.safetensors').stat().st_mode == (tmp_path / 'config.json').stat().st_mode
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(again(images), model(images))
    assert timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=3)(images).shape == (2, 3)


@pytest.mark.parametrize('name', [VIT, 'retrofit'])
def test_timm_pushes_to_a_repository_that_it_reads_back(name, images, tmp_path, monkeypatch):
    """`push_to_hf_hub` with a folder in place of the hub."""
    class LocalHub:
        def __init__(self, **kwargs) -> None:
            pass

        def create_repo(self, repo_id, **kwargs):
            return types.SimpleNamespace(repo_id=repo_id)

        def file_exists(self, **kwargs) -> bool:
            return False

        def upload_folder(self, repo_id, folder_path, **kwargs):
            return shutil.copytree(folder_path, tmp_path / repo_id)

    monkeypatch.setattr(timm.models._hub, 'HfApi', LocalHub)
    model = make(VIT, num_classes=3) if name == VIT else add_context_pool(
        timm.create_model('test_resnet', num_classes=3), img_size=64).eval()
    folder = timm.models.push_to_hf_hub(model, 'someone/pooled')
    assert {'config.json', 'model.safetensors', 'README.md'} <= {path.name for path in folder.iterdir()}
    again = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    assert torch.equal(again(images), model(images))


@pytest.fixture
def image_folder(tmp_path):
    from PIL import Image

    generator = np.random.default_rng(0)
    for label in 'abc':
        folder = tmp_path / 'images' / label
        folder.mkdir(parents=True)
        for i in range(5):
            Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f'{i}.png')
    return tmp_path / 'images'


@pytest.mark.parametrize('name', [CNN, VIT, NAFLEX, 'retrofit'])
def test_fastai_learner(name, image_folder, tmp_path):
    vision = pytest.importorskip('fastai.vision.all')
    torch.manual_seed(0)
    loaders = vision.ImageDataLoaders.from_folder(
        image_folder, valid_pct=.4, seed=0, bs=3, num_workers=0, item_tfms=vision.Resize(64), device='cpu')
    if name == 'retrofit':  # a folder with weights: normalized by its own mean, its body frozen at first
        save_model(add_context_pool(timm.create_model('test_resnet'), img_size=64), str(tmp_path / 'model'))
        learner = vision.vision_learner(loaders, f"local-dir:{tmp_path / 'model'}", path=tmp_path)
        assert loaders.after_batch.fs.filter(vision.risinstance(vision.Normalize))
    else:
        size = {'img_size': 64} if name == VIT else {}
        learner = vision.vision_learner(loaders, name, pretrained=False, path=tmp_path, **SMALL[name], **size)
    pools = [m for m in learner.model.modules() if isinstance(m, ContextPool2d)]
    parameters = [p for pool in pools for p in pool.parameters()]
    before = [p.clone() for p in parameters]
    with learner.no_bar(), learner.no_logging():
        if name == 'retrofit':
            learner.fit(1)
            assert all(map(torch.equal, before, parameters))
            learner.unfreeze()
        learner.fit_one_cycle(2, 1e-2)
        assert np.isfinite(learner.recorder.values).all()
        assert pools and not any(map(torch.equal, before, parameters))

        # its own kind of tensor goes through the pools as a plain one does
        x, _ = loaders.valid.one_batch()
        assert type(x) is vision.TensorImage
        assert torch.equal(torch.Tensor(learner.model.eval()(x)), learner.model(x.as_subclass(torch.Tensor)))
        probabilities, _ = learner.get_preds()
        assert probabilities.shape == (6, 3)
        torch.testing.assert_close(probabilities.sum(1), torch.ones(6))
        path = image_folder / 'a' / '0.png'
        label, _, one = learner.predict(path)
        assert label in 'abc' and one.shape == (3,)
        learner.export('learner.pkl')
        again = vision.load_learner(tmp_path / 'learner.pkl')
        with again.no_bar():
            torch.testing.assert_close(again.predict(path)[2], one)


def test_int8_weights(images):
    quantization = pytest.importorskip('torchao.quantization')
    model = make(VIT)
    expected = model(images)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    got = model(images)
    assert not torch.equal(got, expected)
    torch.testing.assert_close(got, expected, rtol=.1, atol=.1 * float(expected.abs().max()))


def test_captum(images):
    attribution = pytest.importorskip('captum.attr')
    model = make(CNN)
    got = attribution.IntegratedGradients(model).attribute(images, target=1, n_steps=4)
    assert got.shape == images.shape and got.isfinite().all() and got.any()
    pool = next(m for m in model.modules() if isinstance(m, ContextPool2d))
    assert attribution.LayerActivation(model, pool).attribute(images).shape[1] == pool.dim


def test_grad_cam(images):
    cam = pytest.importorskip('pytorch_grad_cam')
    model = make(CNN)
    pool = [m for m in model.modules() if isinstance(m, ContextPool2d)][-1]
    with cam.GradCAM(model, [pool]) as explain:
        heat = explain(images, targets=None)
    assert heat.shape == (2, 32, 32) and np.isfinite(heat).all() and heat.std() > 0
