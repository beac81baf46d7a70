"""The job's models and one batch on a fake GPU, whose tensors have no numbers: what no GPU is needed to find.

What is on the host is real. A mix-up of devices fails in torch's own checks. What would have the host wait for the GPU,
and so leave it idle, fails in `FakeGpu`: numbers read off it, a copy that blocks, or one from memory that is not pinned.
What a kernel does by itself is not seen.
"""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.checkpoints import model_flags
from userdiff.config import parse_args
from userdiff.diffusion import generate
from userdiff.diffusion import model as loading
from userdiff.diffusion.acceleration import ChannelwiseGroupNorm, Compilation, FusedSelfAttnProcessor, GraphedUNet

GPU = torch.device("cuda", 1)
READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
aten = torch.ops.aten
UNGUARDED = {Tensor.contiguous: aten.contiguous, Tensor.copy_: aten.copy_}


class FakeGpu(TorchDispatchMode):
    """Sees every operation: those on the host are done, those of the GPU are done without numbers, or fail."""

    def __init__(self, fake):
        super().__init__()
        self.fake = fake
        self.is_watching = True
        self.num_uploads = self.num_downloads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        values = tree_leaves((args, kwargs))
        if not any(isinstance(value, FakeTensor) or getattr(value, "type", None) == "cuda" for value in values):
            return self.on_host(function, args, kwargs)
        if function is torch.ops.prim.device.default:
            return function(*args)
        if torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), COMPOSITE):
            with self:  # in inference mode `item` and `to` come whole; what they are made of is to be seen
                return function._op_dk(COMPOSITE, *args, **kwargs)
        if self.is_watching:
            has_gpu = any(isinstance(value, Tensor) and value.is_cuda for value in values)
            self.watch(function, args, kwargs, has_gpu=has_gpu)
        args, kwargs = tree_map_only(Tensor, self.without_numbers, (args, kwargs))
        return function(*args, **kwargs)

    def on_host(self, function, args, kwargs):
        """Really do it, except that memory is pinned by name only."""
        is_copied = function.overloadpacket in (aten.pin_memory, aten._pin_memory)
        is_pinned = is_copied or kwargs.pop("pin_memory", False)
        with unset_fake_temporarily():
            result = args[0].clone() if is_copied else function(*args, **kwargs)
        if is_pinned:
            result.is_fake_pinned = True
        return result

    def without_numbers(self, tensor):
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)

    def watch(self, function, args, kwargs, has_gpu):
        packet = function.overloadpacket
        if packet in (aten.index, aten.index_put, aten.index_put_):
            for index in args[1]:
                assert index is None or index.dtype != torch.bool, f"{packet} counts a mask's numbers, and waits"
                assert index is None or index.is_cuda, f"{packet} copies an index, and waits"
        elif has_gpu:
            assert not READS & set(function.tags), f"{packet} reads numbers, and waits"
        if packet is aten._to_copy and kwargs.get("device"):
            self.watch_copy(args[0], None, torch.device(kwargs["device"]), kwargs.get("non_blocking", False))
        elif packet is aten.copy_:
            self.watch_copy(args[1], args[0], args[0].device, args[2] if len(args) > 2 else False)

    def watch_copy(self, source, target, device, is_asynchronous):
        if source.device.type == device.type:
            return
        on_host = target if source.is_cuda else source
        assert is_asynchronous, f"a copy to {device} waits"
        assert hasattr(on_host, "is_fake_pinned"), f"a copy to {device} is of memory that is not pinned"
        self.num_downloads += source.is_cuda
        self.num_uploads += not source.is_cuda


class Unguarded(TorchFunctionMode):
    """Does by the operations it stands for what asks for the current GPU first, which a CPU build of torch cannot."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.__getitem__ and args[0].is_cuda:
            return self.get(*args)
        if function in UNGUARDED and args[0].is_cuda:
            function = UNGUARDED[function]
        return function(*args, **(kwargs or {}))

    @staticmethod
    def get(tensor, index):
        if isinstance(index, Tensor):
            is_number = index.dim() == 0 and index.dtype != torch.bool  # which the host reads
            return tensor.select(0, index.item()) if is_number else aten.index(tensor, [index])
        parts = list(index) if isinstance(index, tuple) else [index]
        if Ellipsis in parts:
            where = parts.index(Ellipsis)
            num_left_out = tensor.dim() - sum(part is not None for part in parts) + 1
            parts[where : where + 1] = [slice(None)] * num_left_out
        dim = 0
        for part in parts:
            if isinstance(part, int):
                tensor = tensor.select(dim, part)
            else:
                tensor = tensor.unsqueeze(dim) if part is None else aten.slice(tensor, dim, part.start, part.stop)
                dim += 1
        return tensor


class Nothing:
    """A stream, an event or a CUDA graph, of which a CPU build of torch has none."""

    def __init__(self, *of):
        pass

    def wait_stream(self, stream):
        pass

    def record_event(self):
        return self

    def query(self):
        return True

    def replay(self):
        pass


@pytest.fixture
def gpu(monkeypatch):
    current = [0]  # GPU of this thread, which is not the model's

    @contextmanager
    def device(chosen):
        current.append(chosen.index)
        yield
        current.pop()

    def graph(graph, stream, **settings):
        assert current[-1] == GPU.index, "a recording on another GPU than the model's holds nothing"
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "device", device)
    for name in ("Stream", "CUDAGraph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Nothing)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
    monkeypatch.setattr(generate, "_copy_stream", Nothing)
    monkeypatch.setattr(loading, "has_bf16", lambda device: True)
    monkeypatch.setattr(Compilation, "apply", lambda *models: None)  # what is rewritten for a compiler, not compiled
    fake = FakeTensorMode()
    with fake, Unguarded(), FakeGpu(fake) as gpu:
        yield gpu


SCHEDULES = {
    "epsilon": {"prediction_type": "epsilon"},
    "v_prediction": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    "sample, clipped": {"prediction_type": "sample", "clip_sample": True},
    "thresholded": {"prediction_type": "epsilon", "thresholding": True},
}
PRECISIONS = {  # of the UNet and of the VAE, which overflows in fp16
    "no": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.bfloat16),
    "bf16": (torch.bfloat16, torch.bfloat16),
}
CASES = [  # any two settings meet in one of them
    (
        schedule,
        precision,
        (0.0, 0.7)[(i + j) % 2],
        ("unit", "signed")[(i // 2 + j) % 2],
        ("as it is", "compiled")[(i + i // 2 + j) % 2],
    )
    for i, schedule in enumerate(SCHEDULES)
    for j, precision in enumerate(PRECISIONS)
]


@pytest.mark.parametrize(("schedule", "precision", "eta", "output_range", "way"), CASES)
def test_a_batch_neither_mixes_devices_nor_waits(
    checkpoint, tmp_path, request, monkeypatch, schedule, precision, eta, output_range, way
):
    DDPMScheduler(**SCHEDULES[schedule]).save_pretrained(tmp_path)
    flags = ["--scheduler_path", tmp_path, "--output_dir", tmp_path / "out", "--num_inference_steps", 3]
    flags += ["--eta", eta, "--vae_output_range", output_range]
    config = parse_args([*model_flags(checkpoint), *map(str, flags)])
    compilation = Compilation(options={"backend": "inductor"}) if way == "compiled" else None
    gpu = request.getfixturevalue("gpu")  # only now: the checkpoint is real
    gpu.is_watching = False  # a job may wait for its models
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = loading.load_model(config, GPU, precision, compilation)
    gpu.is_watching = True
    if eta:
        model.vae.register_to_config(latents_mean=[0.1] * 4, latents_std=[2.0] * 4)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: way == "compiled")
    steps = []
    batch = generate._compute(config, model, [(1, 0), None, (3, 7)], lambda: steps.append(gpu.num_uploads))

    assert isinstance(model.unet, GraphedUNet)
    assert {tensor.device for tensor in (*model.unet.parameters(), *model.vae.parameters())} == {GPU}
    assert (next(model.unet.parameters()).dtype, model.vae.dtype) == PRECISIONS[precision]
    processors = {type(getattr(module, "processor", None)) for module in model.unet.modules()}
    assert FusedSelfAttnProcessor in processors
    norms = {type(module.conv_norm_out) for module in (model.unet.unet, model.vae.decoder)}
    assert norms == {ChannelwiseGroupNorm if compilation else torch.nn.GroupNorm}

    assert batch.is_there()
    assert (batch.pixels.shape, batch.pixels.dtype) == ((3, 16, 16, 3), torch.uint8)
    assert (batch.finite.shape, batch.contradicts_range.shape) == ((3,), ())
    assert {tensor.device.type for tensor in (batch.pixels, batch.finite, batch.contradicts_range)} == {"cpu"}
    # to the GPU before the first step: users, noise and timesteps; at every step its noise; at last mean and deviation;
    # back: these three
    assert steps == ([3, 4, 5] if eta else [3, 3, 3])
    assert (gpu.num_uploads, gpu.num_downloads) == (8 if eta else 3, 3)


READING, COUNTING, INDEXING = "reads numbers, and waits", "counts a mask's numbers, and waits", "copies an index, and"
UP, DOWN, PAGEABLE = "a copy to cuda:1", "a copy to cpu", "is of memory that is not pinned"
MISTAKES = {
    "a number is read": (lambda x: x.sum().item(), f"aten._local_scalar_dense {READING}"),
    "a condition is read": (lambda x: 1 if x.sum() > 0 else 0, f"aten._local_scalar_dense {READING}"),
    "all are compared": (lambda x: torch.equal(x, x + 1), f"aten.equal {READING}"),
    "places are found": (lambda x: torch.where(x > 0), f"aten.nonzero {READING}"),
    "a mask selects": (lambda x: x[x > 0], f"aten.index {COUNTING}"),
    "a mask is written to": (lambda x: x.index_put_((x > 0,), x.sum()), f"aten.index_put_ {COUNTING}"),
    "an index is on the host": (lambda x: x[torch.tensor([0, 1])], f"aten.index {INDEXING} waits"),
    "an index is one number": (lambda x: x[x.sum().long()], f"aten._local_scalar_dense {READING}"),
    "a list is made": (lambda x: x.tolist(), f"aten._local_scalar_dense {READING}"),
    "a download waits": (lambda x: torch.empty(3, pin_memory=True).copy_(x), f"{DOWN} waits"),
    "a download is to new memory": (lambda x: x.to("cpu", non_blocking=True), f"{DOWN} {PAGEABLE}"),
    "a download is to pageable memory": (lambda x: torch.empty(3).copy_(x, non_blocking=True), f"{DOWN} {PAGEABLE}"),
    "an upload waits": (lambda x: torch.zeros(3).pin_memory().to(GPU), f"{UP} waits"),
    "an upload is of pageable memory": (lambda x: torch.zeros(3).to(GPU, non_blocking=True), f"{UP} {PAGEABLE}"),
    "an upload is in place": (lambda x: x.copy_(torch.zeros(3), non_blocking=True), f"{UP} {PAGEABLE}"),
    "a constant is uploaded": (lambda x: x + torch.tensor([1.0], device=GPU), f"{UP} waits"),
}


@pytest.mark.parametrize(("mistake", "found"), MISTAKES.values(), ids=MISTAKES)
def test_what_waits_is_found(gpu, mistake, found):
    with torch.inference_mode(), pytest.raises(AssertionError, match=found):
        mistake(torch.zeros(3, device=GPU))


def test_a_mix_up_of_devices_is_found(gpu):
    mixed = "two (different )?devices,? cuda:1(,| and) cpu"
    with torch.inference_mode(), pytest.raises(RuntimeError, match=mixed):
        torch.zeros(3, device=GPU) + torch.ones(3)


def test_what_does_not_wait_passes(gpu):
    with torch.inference_mode():
        x = torch.zeros(3).pin_memory().to(GPU, non_blocking=True)
        y = x.clamp(0, 1)[x.long()] * torch.tensor(0.5) + 1
        torch.empty(3, pin_memory=True).copy_(y, non_blocking=True)
    assert (gpu.num_uploads, gpu.num_downloads) == (1, 1)
