"""What makes passes fast must change nothing but last bits: each against the plain model."""

import copy
import json
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from tests.checkpoints import model_flags
from tests.jobs import finish, launch, run_job, tree
from tests.oracle import assert_parity, oracle_image
from userdiff.config import parse_args
from userdiff.diffusion import sampler as sampling
from userdiff.diffusion.acceleration import (
    ChannelwiseGroupNorm,
    Compilation,
    FusedSelfAttnProcessor,
    GraphedUNet,
    token_vectors,
    use_fused_self_attention,
    use_single_token,
    use_timestep_table,
)
from userdiff.diffusion.model import load_model
from userdiff.diffusion.schedule import ddim_scheduler, load_noise_scheduler

SHAPES = {
    "as in use": {},
    "Stable Diffusion 1": {"attention_head_dim": 2, "layers_per_block": 2},
    "heads of Stable Diffusion 2": {"attention_head_dim": (2, 4), "use_linear_projection": True},
    "several transformer layers": {"transformer_layers_per_block": 2},
    "only cross-attention": {"only_cross_attention": True},
    "upcast attention": {"upcast_attention": True},
}


def make_unet(**changes):
    torch.manual_seed(0)
    settings = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**settings, **changes}).eval().requires_grad_(False)


def draw(unet, tokens):
    """Latents of three images, after four steps."""
    noise = torch.randn((3, 4, 8, 8), generator=torch.Generator().manual_seed(5))
    return sampling.denoise(unet, ddim_scheduler(load_noise_scheduler(None)), noise, tokens, num_inference_steps=4)


def relative_error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_one_token_needs_no_attention(changes):
    plain = make_unet(**changes)
    fast = copy.deepcopy(plain)
    use_single_token(fast)
    tokens = torch.randn((3, 1, 16), generator=torch.Generator().manual_seed(1))
    vectors = token_vectors(fast, tokens)
    assert vectors.shape[:2] == (3, 1)
    expected = draw(plain, tokens)
    assert relative_error(draw(fast, vectors), expected) < 1e-5
    # each image has its own user's vectors
    assert relative_error(draw(fast, vectors.flip(0)), expected) > 1e-3


def test_queries_and_keys_are_not_computed():
    fast = make_unet()
    use_single_token(fast)
    vectors = token_vectors(fast, torch.zeros(1, 1, 16))
    for name, module in fast.named_modules():
        if name.endswith(("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")):
            module.forward = None  # a call would fail
    fast(torch.zeros(1, 4, 8, 8), torch.tensor(1), vectors)


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_all_that_a_gpu_gets_changes_nothing(changes):
    plain = make_unet(**changes)
    fast = copy.deepcopy(plain)
    state = torch.get_rng_state()
    use_single_token(fast)
    use_timestep_table(fast, 1000)
    use_fused_self_attention(fast, is_flex=False)
    assert torch.equal(torch.get_rng_state(), state)  # no random numbers are drawn
    assert fast.time_proj.table.shape[0] == 1000
    is_fused = any(isinstance(getattr(layer, "processor", None), FusedSelfAttnProcessor) for layer in fast.modules())
    assert is_fused == changes.keys().isdisjoint({"upcast_attention"})
    latents = torch.randn((3, 4, 8, 8), generator=torch.Generator().manual_seed(2))
    tokens = torch.randn((3, 1, 16), generator=torch.Generator().manual_seed(1))
    vectors = token_vectors(fast, tokens)
    passes = {}
    for step in (0, 17, 999):
        passes[step] = plain(latents, torch.tensor(step), tokens, return_dict=False)[0]
        found = fast(latents, torch.tensor(step), vectors, return_dict=False)[0]
        assert relative_error(found, passes[step]) < 1e-5
    assert relative_error(passes[17], passes[999]) > 1e-3  # each timestep has its own row
    assert relative_error(draw(fast, vectors), draw(plain, tokens)) < 1e-5


def test_a_unet_of_another_make_is_left_as_it_is():
    unet = make_unet(
        down_block_types=("SimpleCrossAttnDownBlock2D", "DownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("UpBlock2D", "SimpleCrossAttnUpBlock2D"),
    )
    tokens = torch.randn((3, 1, 16), generator=torch.Generator().manual_seed(1))
    expected = draw(unet, tokens)
    modules = list(unet.modules())
    use_single_token(unet)
    use_timestep_table(unet, 1000)
    use_fused_self_attention(unet, is_flex=False)
    assert list(unet.modules()) == modules
    assert token_vectors(unet, tokens) is tokens
    assert torch.equal(draw(unet, tokens), expected)


@pytest.fixture
def compiling(monkeypatch):
    """What is written for a compiler, done without one."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


def norms(channels):
    """A group norm, and the one that sums channel by channel."""
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, channels).requires_grad_(False)
    norm.weight.normal_()
    norm.bias.normal_()
    return norm, ChannelwiseGroupNorm(norm)


@pytest.mark.parametrize(("mean", "most"), [(0, 1e-6), (1000, 1e-4)])  # of which float32 keeps three digits fewer
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 8, 16, 16), (3, 12, 8, 40), (1, 4, 64, 64)])
def test_norms_channel_by_channel_are_group_norms(compiling, shape, layout, mean, most):
    norm, channelwise = norms(shape[1])
    x = (torch.randn(shape) + mean).to(memory_format=layout)
    found = channelwise(x)
    assert found.dtype == torch.float32
    assert relative_error(found, copy.deepcopy(norm).double()(x.double())) < most


def test_norms_of_half_precision_are_summed_in_float32(compiling):
    norm, channelwise = (one.half() for one in norms(8))
    x = (torch.randn(2, 8, 16, 16) * 100 + 1000).half()
    found = channelwise(x)
    assert found.dtype == torch.float16
    assert relative_error(found, norm.double()(x.double())) < 2e-3


@pytest.mark.parametrize("shape", [(2, 8, 8, 8), (2, 8, 15, 17), (2, 8, 400)])
def test_norms_of_small_images_and_of_other_shapes_are_torchs(compiling, shape):
    norm, channelwise = norms(8)
    x = torch.randn(shape)
    assert torch.equal(channelwise(x), norm(x))


def test_norms_that_are_not_compiled_are_torchs():
    norm, channelwise = norms(8)
    x = torch.randn(2, 8, 16, 16)
    assert torch.equal(channelwise(x), norm(x))


class RecordedUNet(nn.Module):
    """Stands in for a UNet and for CUDA graphs: the graph that records a pass makes it again at every replay."""

    def __init__(self, plain):
        super().__init__()
        self.plain, self.config = plain, plain.config
        self.recorder, self.num_recorded = None, 0

    def forward(self, *inputs, return_dict):
        (output,) = self.plain(*inputs, return_dict=return_dict)
        if self.recorder is not None:
            self.recorder.replay = lambda: output.copy_(self.plain(*inputs, return_dict=False)[0])
        return (output,)

    @contextmanager
    def record(self, graph, **settings):
        self.recorder, self.num_recorded = graph, self.num_recorded + 1
        yield
        self.recorder = None


def test_a_graph_is_recorded_once_for_each_shape_and_fed(monkeypatch):
    unet = RecordedUNet(make_unet())
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "graph", unet.record)
    graphed = GraphedUNet(unet)
    passes = []
    shapes = [(2, torch.long, 1), (2, torch.long, 1), (3, torch.long, 2), (3, torch.int, 3), (2, torch.long, 3)]
    for step, (batch, dtype, num_recorded) in enumerate(shapes):
        given = torch.randn(batch, 4, 8, 8), torch.tensor(step, dtype=dtype), torch.randn(batch, 1, 16)
        assert torch.equal(graphed(*given)[0], unet.plain(*given, return_dict=False)[0])
        assert unet.num_recorded == num_recorded
        passes.append((given, copy.deepcopy(given)))
    # what was given is copied, and stays as it was
    assert all(torch.equal(*pair) for given, before in passes for pair in zip(given, before, strict=True))
    graphed.forget()
    graphed(*given)
    assert unet.num_recorded == 4


def test_kernels_chosen_by_timing_are_refused(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "max-autotune")
    assert run_job(*model_flags(checkpoint), "--output_dir", tmp_path / "out") == 2
    assert capsys.readouterr().err.startswith("batch_generate.py: error: --dynamo_mode: max-autotune chooses kernels")
    assert not (tmp_path / "out").exists()


def test_a_frozen_graph_draws_each_user_their_own():
    """The trap of a compiled graph with frozen weights: vectors it had taken for constants would draw user A for B."""
    from torch._inductor import config

    plain = make_unet(  # as few kernels as can be: each is a call of the C++ compiler
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
    )
    fast = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    use_single_token(fast)
    with torch.inference_mode(), config.patch(freezing=False):  # is set by what is tested
        Compilation(options={"backend": "inductor", "dynamic": False}).apply(fast, AutoencoderKL())
        assert config.freezing
        for user in range(3):
            tokens = torch.randn((3, 1, 16), generator=torch.Generator().manual_seed(user))
            assert relative_error(draw(fast, token_vectors(fast, tokens)), draw(plain, tokens)) < 1e-5


def test_blocks_that_are_alike_are_compiled_once(checkpoint, tmp_path):
    """What differs from block to block, frozen weights or a slice of vectors, would compile each, and none after eight."""
    from torch._dynamo.utils import counters
    from torch._inductor import config

    job = parse_args([*model_flags(checkpoint), "--output_dir", str(tmp_path / "out")])
    with config.patch(freezing=True), torch.inference_mode():
        regional = Compilation(options={"backend": "eager", "dynamic": False}, is_regional=True)
        unet = load_model(job, torch.device("cpu"), "no", regional).unet
        counters.clear()
        draw(unet, token_vectors(unet, torch.randn(3, 1, 16)))
    assert sum(type(module).__name__ == "BasicTransformerBlock" for module in unet.modules()) == 4
    assert counters["stats"]["unique_graphs"] == 2  # of 8 channels, and of 16


def test_compiled_launches_make_the_same_bytes(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    compiled = ["--dynamo_backend", "inductor", "--dynamo_use_regional_compilation"]
    job = [*model_flags(checkpoint), "--num_inference_steps", 3, "--num_images_per_user", 2, "--batch_size", 2]
    for number in (1, 2):
        process = launch(number, *job, "--output_dir", tmp_path / str(number), launcher_flags=compiled)
        status, _, stderr = finish(process, timeout=400)
        assert status == 0, stderr
    assert tree(tmp_path / "1") == tree(tmp_path / "2")
    record = json.loads((tmp_path / "2" / "run.json").read_text())
    assert record["numerics"]["compiled"] == "inductor, regional"
    items = [(user_id, image_index) for user_id in range(1, 6) for image_index in range(2)]
    assert_parity(tmp_path / "2", {item: oracle_image(checkpoint, *item, steps=3) for item in items})
