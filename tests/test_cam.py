"Class activation maps: brute force, Captum and grad-cam where it can be imported, their costs, odd layers, and bad input."
import captum.attr
import numpy as np
import pytest
import torch
from sklearn.cluster import DBSCAN
from torch import nn
from whatmatters.attribution import cam
from whatmatters.core.hooks import module_of, patch
from whatmatters.core.values import class_value, count_calls

GRADIENT = [cam.grad_cam, cam.hires_cam, cam.grad_cam_plus_plus, cam.cf_cam]
ALL = [*GRADIENT, cam.eigen_cam, cam.score_cam]
named = pytest.mark.parametrize("method", ALL, ids=lambda m: m.__name__)


class Net(nn.Module):
    "Two stages; counts the rows that come before and behind its layer."
    def __init__(self):
        super().__init__()
        self.first, self.layer, self.out = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.ReLU()), nn.Sequential(nn.Conv2d(6, 12, 3), nn.ReLU()), nn.Linear(12, 5)
        self.behind = 0
    def forward(self, x):
        h = self.layer(self.first(x))
        self.behind += len(x)
        return self.out((h ** 2).mean((2, 3)) + h.amax((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


@pytest.fixture
def x(): return torch.rand(7, 3, 20, 26, generator=torch.Generator().manual_seed(1))


CLASSES = torch.tensor([0, 1, 2, 3, 4, 0, 1])


def close(a, b, tolerance=1e-5): torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


def parts(net, x, classes):
    "Activations and gradients, the plain way."
    h = net.layer(net.first(x)).detach().requires_grad_()
    value = net.out((h ** 2).mean((2, 3)) + h.amax((2, 3))).gather(1, classes[:, None]).sum()
    return h.detach(), torch.autograd.grad(value, h)[0]


def hooks(net): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in net.modules())


def test_gradient_maps_equal_captum(net, x):
    f, inside = class_value(net), dict(args=(CLASSES,), raw=True)
    theirs = captum.attr.LayerGradCam(net, net.layer)
    close(cam.grad_cam(f, x, net.layer, **inside), theirs.attribute(x, target=CLASSES, relu_attributions=False).detach())
    close(cam.hires_cam(f, x, net.layer, **inside), captum.attr.LayerGradientXActivation(net, net.layer).attribute(x, target=CLASSES).sum(1, keepdim=True).detach())


@pytest.mark.parametrize("eps", [0., 1e-6])
def test_grad_cam_plus_plus_by_its_derivatives(net, x, eps):
    "Weights from the first three derivatives of exp(score) along each activation, in double precision, at each place by itself."
    h, g = (t.double() for t in parts(net, x, CLASSES))
    found = cam.grad_cam_plus_plus(class_value(net), x, net.layer, eps=eps, args=(CLASSES,), raw=True)
    wanted = torch.zeros(len(x), 1, *h.shape[2:], dtype=torch.float64)
    for i in range(len(x)):
        for k in range(h.shape[1]):
            second, third = g[i, k] ** 2, g[i, k] ** 3 # over exp(score), where the score is taken as linear in the activation
            alpha = second / (2 * second + third * h[i, k].sum() + eps)
            wanted[i, 0] += (alpha.nan_to_num(0) * g[i, k].clamp_min(0)).sum() * h[i, k]
    close(found, wanted.float())


@pytest.mark.parametrize("places", ["many", "few"])
def test_eigen_cam_is_the_first_component(net, x, places):
    if places == "few": x = x[:, :, :9, :11]
    found = cam.eigen_cam(class_value(net), x, net.layer, args=(CLASSES,), raw=True)
    for h, m in zip(parts(net, x, CLASSES)[0].double().numpy(), found.numpy()):
        centred = h.reshape(12, -1).T - h.reshape(12, -1).mean(1)
        wanted = centred @ np.linalg.svd(centred)[2][0]
        wanted *= np.sign(wanted @ h.reshape(12, -1).mean(0))
        assert np.abs(m.ravel() - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("channels", [None, 4])
def test_score_cam_by_a_loop(net, x, channels):
    net.layer[0].bias[2:4] = -100. # two dead channels
    found = cam.score_cam(class_value(net), x, net.layer, channels, 5, args=(CLASSES,), raw=True)
    for image, c, h, m in zip(x, CLASSES, parts(net, x, CLASSES)[0], found):
        h = h if channels is None else h[h.flatten(1).var(1).argsort(descending=True)[:channels]]
        big = nn.functional.interpolate(h[None], (20, 26), mode="bilinear", align_corners=True)[0]
        low, high = big.amin((1, 2), keepdim=True), big.amax((1, 2), keepdim=True)
        scores = torch.stack([net(image[None] * k)[0, c] for k in (big - low) / (high - low).clamp_min(1e-12)])
        close(m[0], (scores.softmax(0)[:, None, None] * h).sum(0))


def test_cf_cam_by_a_loop(net, x):
    "Dominant channels as they are; in each cluster a Gaussian mean of gradient maps over its channels, then the mean over places, times the cluster's weight."
    h, g = (t.double().numpy() for t in parts(net, x, CLASSES))
    found, clustered = cam.cf_cam(class_value(net), x, net.layer, .25, .6, 2, args=(CLASSES,), raw=True), 0
    for i in range(len(x)):
        mean, maps = g[i].mean((1, 2)), h[i].reshape(12, -1)
        lead = np.argsort(-np.abs(mean), kind="stable")[:3]
        rest = [k for k in range(12) if k not in lead and maps[k].any()]
        distance = np.array([[max(0., 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a in maps[rest]] for b in maps[rest]])
        labels = DBSCAN(eps=.6, min_samples=2, metric="precomputed").fit_predict(distance)
        wanted = np.tensordot(mean[lead], h[i, lead], 1)
        for c in set(labels) - {-1}:
            members = np.flatnonzero(labels == c)
            near = np.exp(-distance[np.ix_(members, members)] ** 2 / (2 * .6 ** 2))
            smoothed = np.tensordot(near / near.sum(1, keepdims=True), g[i, np.array(rest)[members]], 1).mean((1, 2))
            wanted = wanted + np.abs(smoothed).mean() / np.abs(mean[lead]).mean() * np.tensordot(smoothed, h[i, np.array(rest)[members]], 1)
            clustered += len(members)
        close(found[i, 0].double(), torch.from_numpy(wanted), 1e-4)
    assert clustered


@pytest.mark.parametrize("least", [1, 3, 6])
def test_clusters_of_many_images_are_those_of_dbscan(least):
    "Also which cluster a border point between two joins; and many images are one by one when their distances are large."
    points = torch.rand(20, 40, 2, generator=torch.Generator().manual_seed(least))
    distance = torch.cdist(points, points)
    found = cam._clusters(distance <= .12, least)
    for d, labels in zip(distance.double().numpy(), found):
        wanted = DBSCAN(eps=.12, min_samples=least, metric="precomputed").fit_predict(d)
        _, ours = np.unique(labels.numpy(), return_inverse=True)
        assert np.array_equal(ours - (labels.min() < 0).item(), wanted)
    places = torch.tensor([0., 1, 2, 3, 13, 23, 24, 25, 26]) # 13 is no core point, and near one of either cluster
    shuffled = torch.stack([places[torch.randperm(9, generator=torch.Generator().manual_seed(s))] for s in range(20)])
    for at, labels in zip(shuffled, cam._clusters((shuffled[:, :, None] - shuffled[:, None]).abs() <= 10, 4)):
        wanted = DBSCAN(eps=10, min_samples=4).fit_predict(at[:, None].numpy())
        assert np.array_equal(np.unique(labels.numpy(), return_inverse=True)[1], wanted) and set(wanted) == {0, 1}


def test_cf_cam_with_many_channels_takes_one_image_at_a_time():
    h = torch.rand(3, 2100, 2, 2)
    f, layer, sizes = lambda x: (layer(x) ** 2).mean((1, 2, 3)), nn.Identity(), []
    inner, cam._filtered = cam._filtered, lambda w, *rest: sizes.append(len(w)) or inner(w, *rest)
    try: every = cam.cf_cam(f, h, layer, eps=.05, raw=True)
    finally: cam._filtered = inner
    assert sizes == [1, 1, 1]
    close(every[1:2], cam.cf_cam(f, h[1:2], layer, eps=.05, raw=True), 1e-4)


@named
def test_many_images_are_each_by_itself_whatever_the_chunk(net, x, method):
    f = class_value(net)
    every = method(f, x, net.layer, args=(CLASSES,))
    assert every.shape == (7, 1, 20, 26) and every.amin() >= 0 and every.amax() <= 1 + 1e-6
    close(method(f, x, net.layer, args=(CLASSES,), chunk=2), every, 1e-4)
    close(torch.cat([method(f, x[i:i + 1], net.layer, args=(CLASSES[i:i + 1],)) for i in range(7)]), every, 1e-4)


def test_passes(net, x):
    for method in GRADIENT:
        f = count_calls(class_value(net))
        method(f, x, net.layer, args=(CLASSES,))
        assert (f.calls, f.rows) == (1, 7)
    passed = []
    handles = [m.register_full_backward_hook(lambda m, *_: passed.append(m)) for m in (net.first, net.layer[0], net.out)]
    net.requires_grad_(True) # so that a backward pass could go all the way
    cam.grad_cam(class_value(net), x, net.layer, args=(CLASSES,))
    for handle in handles: handle.remove()
    assert passed == [net.out]                   # it ends at the layer
    f, net.behind = count_calls(class_value(net)), 0
    cam.eigen_cam(f, x, net.layer, args=(CLASSES,))
    assert (f.calls, f.rows, net.behind) == (1, 7, 0) # nothing behind the layer runs
    net.layer[0].bias.data += 1.                 # no flat channel
    for channels in (None, 5):
        f = count_calls(class_value(net))
        cam.score_cam(f, x, net.layer, channels, 64, args=(CLASSES,))
        asked = 7 * (channels or 12)
        assert (f.rows, f.calls) == (7 + asked, 1 + -(-asked // 64))
    net.layer[0].bias.data[:6] = -100.           # six flat channels cost one row per image
    f = count_calls(class_value(net))
    cam.score_cam(f, x, net.layer, args=(CLASSES,))
    assert f.rows == 7 + 7 * 7


@named
def test_nothing_is_left_behind(net, x, method):
    f, before = class_value(net), {n: p.clone() for n, p in net.named_parameters()}
    method(f, x, net.layer, args=(CLASSES,))
    assert not hooks(net) and not x.requires_grad
    def broken(x, classes):
        f(x, classes)
        raise KeyError("mine")
    if method is not cam.eigen_cam: # which never gets there
        with pytest.raises(KeyError, match="mine"): method(broken, x, net.layer, args=(CLASSES,))
    with pytest.raises(ValueError, match="never calls"): method(f, x, nn.ReLU(), args=(CLASSES,))
    def stop(h, call): raise KeyError("in the layer")
    with pytest.raises(KeyError, match="in the layer"), patch({net.first: stop}): method(f, x, net.layer, args=(CLASSES,))
    assert not hooks(net) and torch.is_grad_enabled() and all(torch.equal(p, before[n]) and p.grad is None for n, p in net.named_parameters())


def test_the_last_layer_with_places(net, x):
    from transformers import ResNetConfig, ResNetForImageClassification
    assert cam.map_layer(net, x) == "layer" and not hooks(net)
    resnet = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)).eval().requires_grad_(False)
    images = torch.rand(2, 3, 32, 32)
    name = cam.map_layer(resnet, images)
    assert name.endswith("stages.1")
    maps = cam.grad_cam(class_value(lambda x: resnet(x).logits), images, module_of(resnet, name), args=(CLASSES[:2],), raw=True)
    close(maps, captum.attr.LayerGradCam(lambda x: resnet(x).logits, module_of(resnet, name)).attribute(images, target=CLASSES[:2]).detach(), 1e-4)


@named
def test_bfloat16_follows_single_precision(net, x, method):
    f, half = class_value(net), Net().eval().requires_grad_(False)
    half.load_state_dict(net.state_dict())
    half = half.bfloat16()
    found = method(class_value(half), x.bfloat16(), half.layer, args=(CLASSES,), raw=True)
    assert found.dtype == torch.float32 and found.isfinite().all()
    wanted = method(f, x, net.layer, args=(CLASSES,), raw=True)
    alike = [torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] for a, b in zip(found, wanted)]
    assert torch.stack(alike).median() > .95, alike
    scales = cam.multi_scale(lambda x, c: method(class_value(half), x, half.layer, args=(c,)), x.bfloat16(), args=(CLASSES,))
    assert scales.dtype == torch.float32 and scales.isfinite().all()


def test_a_flat_map_is_zero(net, x):
    net.out.weight.zero_()
    for method in GRADIENT: assert not cam.grad_cam(class_value(net), x, net.layer, args=(CLASSES,)).any()
    assert not cam.eigen_cam(lambda x: net.first(x).sum((1, 2, 3)), torch.zeros_like(x), net.first).any()


def test_grad_cam_plus_plus_of_a_tiny_gradient(net, x):
    "Its square is zero in single precision; without `eps` the weights tend to half the sum of the positive gradients."
    net.out.weight.mul_(1e-25)
    h, g = parts(net, x, CLASSES)
    found = cam.grad_cam_plus_plus(class_value(net), x, net.layer, eps=0., args=(CLASSES,), raw=True)
    close(found * 1e25, ((g * 1e25).clamp_min(0).sum((2, 3), keepdim=True) / 2 * h).sum(1, keepdim=True), 1e-4)


@pytest.mark.parametrize("registers", [0, 4])
def test_transformers_vit(registers):
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersForImageClassification, ViTConfig, ViTForImageClassification
    torch.manual_seed(0)
    small = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=4, num_labels=5)
    vit = (Dinov2WithRegistersForImageClassification(Dinov2WithRegistersConfig(num_register_tokens=4, mlp_ratio=2, **small)) if registers else ViTForImageClassification(ViTConfig(intermediate_size=32, **small))).eval()
    f, images, classes = class_value(lambda x: vit(x).logits), torch.rand(2, 3, 24, 24), torch.tensor([1, 3])
    blocks = sorted({n.split(".norm1")[0].split(".layernorm_before")[0] for n, _ in vit.named_modules() if n.endswith(("norm1", "layernorm_before"))})
    layer = module_of(vit, blocks[-1] + (".norm1" if registers else ".layernorm_before"))
    for method in ALL: assert method(f, images, layer, args=(classes,), raw=True).shape == (2, 1, 6, 6)
    raw = cam.hires_cam(f, images, layer, args=(classes,), raw=True)
    theirs = captum.attr.LayerGradientXActivation(lambda x: vit(x).logits, layer).attribute(images, target=classes)
    close(raw, theirs[:, 1 + registers:].sum(2).view(2, 1, 6, 6).detach(), 1e-4)
    if not registers: # its head reads the class token alone
        with pytest.raises(ValueError, match="layer: got tokens whose gradients are all zero"): cam.grad_cam(f, images, module_of(vit, blocks[-1]), args=(classes,))
        with pytest.raises(ValueError, match="scales: got 0.75, images of 18 x 18"): cam.multi_scale(lambda x, c: cam.grad_cam(f, x, layer, args=(c,)), images, args=(classes,))
        free = class_value(lambda x: vit(x, interpolate_pos_encoding=True).logits)
        assert cam.multi_scale(lambda x, c: cam.grad_cam(free, x, layer, args=(c,)), images, (.5, 1., 1.5), args=(classes,)).shape == (2, 1, 24, 24)


@pytest.mark.parametrize("tokens, size, wanted", [(36, (24, 24), (6, 6)), (37, (24, 24), (6, 6)), (38, (24, 24), (6, 6)), (41, (24, 24), (6, 6)), (24, (16, 24), (4, 6)), (25, (48, 32), (6, 4)), (197, (224, 224), (14, 14))])
def test_grids(tokens, size, wanted): assert cam._grid_of(tokens, torch.empty(1, 3, *size), None) == wanted


def test_several_scales(net, x):
    f, seen = class_value(net), []
    def attribute(images, classes):
        seen.append(tuple(images.shape[2:]))
        return cam.hires_cam(f, images, net.layer, args=(classes,), raw=True)
    found = cam.multi_scale(attribute, x, (.5, 1., 1.5), (0, 2, 1), args=(CLASSES,))
    assert seen == [(10, 13), (20, 26), (30, 39)] and found.shape == (7, 1, 20, 26)
    def one(scale):
        images = x if scale == 1 else nn.functional.interpolate(x, [round(20 * scale), round(26 * scale)], mode="bilinear", antialias=True)
        m = nn.functional.interpolate(attribute(images, CLASSES), (20, 26), mode="bilinear", antialias=True)
        return m / m.abs().amax((2, 3), keepdim=True)
    close(found, (2 * one(1.) + one(1.5)) / 3)
    assert cam.multi_scale(attribute, x.bfloat16().float(), (1.,), args=(CLASSES,)).abs().amax((1, 2, 3)).allclose(torch.ones(7))


def test_bad_input(net, x):
    f = class_value(net)
    def refused(match, method, *given, **more):
        with pytest.raises(ValueError, match=match): method(*given, **{"args": (CLASSES,), **more})
    with pytest.raises(ValueError, match="such as layer"): module_of(net, "layr")
    for method in ALL:
        refused("layer: got 'layer'; want a module", method, f, x, "layer")
        refused("layer: got an activation of shape", method, f, x, net.out)
        refused("x: got shape", method, f, x[0], net.layer)
        refused("x: got .* NaN", method, f, x.where(x > .5, torch.nan), net.layer)
        refused(r"args\[0\]", method, f, x, net.layer, args=(CLASSES[:3],))
        for grid in ((3, 3), 3, (3,)): refused("grid: got", method, f, x, net.layer, grid=grid)
        refused(r"args\[0\]: got NoneType; want 7 rows", method, f, x, net.layer, args=(None,))
        refused("chunk: got 0", method, f, x, net.layer, chunk=0)
        refused("more than a single place", method, lambda x, c: net.out(pool(net.layer(net.first(x))).flatten(1))[:, 0], x, pool := nn.AdaptiveAvgPool2d(1))
    refused("f: got values of shape", cam.grad_cam, lambda x, c: net(x), x, net.layer)
    refused("channels: got 13; want at most 12", cam.score_cam, f, x, net.layer, 13)
    refused("channels: got 0", cam.score_cam, f, x, net.layer, 0)
    for name, values in dict(dominant=(0, 1.5), eps=(0., 2.), least=(0,)).items():
        for v in values: refused(f"{name}: got", cam.cf_cam, f, x, net.layer, **{name: v})
    refused("eps: got", cam.grad_cam_plus_plus, f, x, net.layer, -1.)
    attribute = lambda x, c: cam.grad_cam(f, x, net.layer, args=(c,))
    for scales in ((), (0.,), (1., -1.), (float("nan"),)): refused("scales: got", cam.multi_scale, attribute, x, scales)
    refused("weights: got", cam.multi_scale, attribute, x, (1., 2.), (1.,))
    refused("weights: got", cam.multi_scale, attribute, x, (1., 2.), (0., 0.))
    refused("attribute: got maps of shape", cam.multi_scale, lambda x, c: x.sum(1), x, (1.,))
    with pytest.raises((RuntimeError, IndexError, ValueError), match="out of bounds|out of range|classes"): cam.grad_cam(f, x, net.layer, args=(CLASSES + 3,))
    assert not hooks(net)


def test_similarity_and_points():
    features, query = torch.randn(3, 8, 4, 5), torch.randn(3, 8)
    found = cam.similarity_map(features, query)
    torch.testing.assert_close(found, nn.functional.cosine_similarity(features, query[..., None, None])[:, None])
    tokens = torch.cat([torch.randn(3, 1, 8), features.flatten(2).mT], 1)
    torch.testing.assert_close(cam.similarity_map(tokens, query, (4, 5)), found)
    high, low = cam.map_points(found, 2, 4)
    for m, h, l in zip(found[:, 0], high, low):
        assert [m[tuple(p)].item() for p in h] == sorted(m.flatten().tolist())[::-1][:2]
        assert [m[tuple(p)].item() for p in l] == sorted(m.flatten().tolist())[:4]
    for wrong in (lambda: cam.similarity_map(tokens, query), lambda: cam.similarity_map(tokens, query, (4,)), lambda: cam.similarity_map(tokens, query, (5, 5)), lambda: cam.similarity_map(features, query[:, :3]), lambda: cam.map_points(found, 15, 6), lambda: cam.map_points(found[:, 0]),
                  lambda: cam.attended(tokens, torch.rand(3, 22)), lambda: cam.attended(tokens, -torch.rand(3, 20)), lambda: cam.boost_lu(found, 1.)):
        with pytest.raises(ValueError, match="got .*; want "): wrong()


@pytest.mark.parametrize("name", ["GradCAM", "HiResCAM", "GradCAMPlusPlus", "EigenCAM", "ScoreCAM"])
def test_pictures_equal_grad_cam(net, x, name):
    theirs = pytest.importorskip("pytorch_grad_cam")
    ours = {"GradCAM": cam.grad_cam, "HiResCAM": cam.hires_cam, "GradCAMPlusPlus": cam.grad_cam_plus_plus, "EigenCAM": cam.eigen_cam, "ScoreCAM": cam.score_cam}[name]
    targets = [lambda out, c=int(c): out[c] for c in CLASSES]
    net.requires_grad_(True)
    with getattr(theirs, name)(model=net, target_layers=[net.layer]) as peer: wanted = torch.from_numpy(peer(input_tensor=x.clone(), targets=targets))[:, None]
    found = ours(class_value(net), x, net.layer, args=(CLASSES,))
    gap = (found - wanted).abs().amax((1, 2, 3))
    if name == "EigenCAM": # the sign of its component is as it comes
        raw = ours(class_value(net), x, net.layer, args=(CLASSES,), raw=True)
        gap = torch.minimum(gap, (cam._picture(-raw, x.shape[2:]) - wanted).abs().amax((1, 2, 3)))
    assert gap.max() < 1e-4
