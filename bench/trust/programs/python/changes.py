"""What may be changed between two calls of a sampler, as lines of source; features bring changes of their own.

The lines run at the top of the program's module, once in the world that is compiled and once in its twin. Names are
``denoiser``, ``loop`` and, where something is compiled, ``sampler``; it is None in the twin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.trust.programs.python.features import FEATURES

_WEIGHT = "weight = denoiser.head.weight\n"

WEIGHTS: Mapping[str, str] = {
    "weight written in place": _WEIGHT + "with torch.no_grad():\n    weight.mul_(1.1)",
    "weight written through .data": _WEIGHT + "weight.data.mul_(1.1)",
    "weight's .data assigned": _WEIGHT + "weight.data = weight.data * 1.1",
    "weight written through numpy": _WEIGHT + "weight.detach().numpy()[:] *= 1.1",
    "weight assigned": "denoiser.head.weight = nn.Parameter(denoiser.head.weight.detach() * 1.1)",
    "bias removed": "denoiser.head.bias = None",
    "step of a fused optimizer": "fused_step(denoiser.parameters())",
    "step of an optimizer": "fused_step(denoiser.parameters(), fused=False)",
    "state dict loaded": """
        denoiser.load_state_dict({name: value * 1.1 for name, value in denoiser.state_dict().items()})
        """,
    "state dict assigned": """
        denoiser.load_state_dict({name: value * 1.1 for name, value in denoiser.state_dict().items()}, assign=True)
        """,
    "one element of a weight": _WEIGHT + "with torch.no_grad():\n    weight[-1, -1] += 0.5",
    "weights of a block": "with torch.no_grad():\n    for p in denoiser.net.parameters():\n        p.mul_(1.1)",
    "weights of a block through .data": "for p in denoiser.net.parameters():\n    p.data.mul_(1.1)",
    "weights of a block by a fused optimizer": "fused_step(denoiser.net.parameters())",
    "weights tied": "denoiser.foot.weight = denoiser.head.weight",
    "frozen weights": "denoiser.requires_grad_(False)",
    "to and back": "denoiser.to(torch.float32).to(torch.float64)",
}
"""Weights, which are never folded for good: after ``refresh()`` the sampler is right."""

MODULES: Mapping[str, str] = {
    "submodule replaced": "denoiser.head = with_weights(nn.Linear(4, 4), 3)",
    "submodule replaced by another class": "denoiser.head = nn.Identity()",
    "submodule wrapped": "denoiser.head = nn.Sequential(denoiser.head, nn.Tanh())",
    "submodule of a subclass": "denoiser.head.__class__ = Louder",
    "submodule appended": "denoiser.tail.append(with_weights(nn.Linear(4, 4), 3))",
    "submodule deleted": "denoiser.tail = nn.Sequential()",
    "block replaced": "denoiser.net = with_weights(copy.deepcopy(denoiser.net), 5)",
    "adapter injected": "denoiser.head = Adapter(denoiser.head)",
    "adapter in a hook": "denoiser.head.register_forward_hook(lambda m, args, output: output + 0.1 * args[0])",
    "adapter by a method": """
        plain = denoiser.head.forward
        denoiser.head.forward = lambda x: plain(x) + 0.1 * x
        """,
    "weight normed": "nn.utils.parametrizations.weight_norm(denoiser.head)",
    "hook added": "denoiser.net.register_forward_hook(lambda module, args, output: output * 0.8)",
    "hook before added": "denoiser.net.register_forward_pre_hook(lambda module, args: (args[0] * 0.8, *args[1:]))",
    "hook of the denoiser": "denoiser.register_forward_pre_hook(lambda module, args: (args[0] * 0.8, *args[1:]))",
    "global hook added": """
        HANDLES.append(
            nn.modules.module.register_module_forward_hook(
                lambda module, args, output: output * 0.8 if module is denoiser.head else None
            )
        )
        """,
    "forward of an instance replaced": "denoiser.head.forward = lambda x: x * 0.5",
    "forward of the denoiser replaced": """
        whole = denoiser.forward
        denoiser.forward = lambda x, t, **given: whole(x * 0.8, t, **given)
        """,
    "forward of a class replaced": "Denoiser.finish = lambda self, h: h * 0.5",
    "eps of a norm": "denoiser.norm.eps = 0.5",
    "training flag": "denoiser.train()",
    "training flag of a dropout": "denoiser.dropout.train()",
    "number of an activation": "denoiser.act.negative_slope = 0.5",
    "number of a module of torch": "denoiser.norm.normalized_shape = (4,)",
}
"""Modules, hooks, forwards and plain attributes."""

HOLDERS: Mapping[str, tuple[str, str]] = {
    "refreshed": ("sampler.refresh()", ""),
    "copied": ("sampler = copy.copy(sampler)", ""),
    "deep copied": (
        "sampler = copy.deepcopy(sampler)\ndenoiser, loop = sampler.model, sampler.loop",
        "denoiser, loop = copy.deepcopy((denoiser, loop))",
    ),
    "pickled": (
        "sampler = pickle.loads(pickle.dumps(sampler))\ndenoiser, loop = sampler.model, sampler.loop",
        "denoiser, loop = pickle.loads(pickle.dumps((denoiser, loop)))",
    ),
    "sampler in train mode": ("sampler.train()", "denoiser.train()"),
    "weights loaded into the sampler": (
        "sampler.load_state_dict({name: value * 1.1 for name, value in sampler.state_dict().items()})",
        """
        for module in (denoiser, loop):
            if isinstance(module, nn.Module):
                module.load_state_dict({name: value * 1.1 for name, value in module.state_dict().items()})
        """,
    ),
    "sampler of one form": ("sampler.max_forms = 1", ""),
    "loop replaced": ("loop = sampler.loop = other_loop", "loop = other_loop"),
    "model replaced": (
        "denoiser = sampler.model = with_weights(copy.deepcopy(denoiser), 9)",
        "denoiser = with_weights(copy.deepcopy(denoiser), 9)",
    ),
    "schedule replaced": ("sampler.schedule = all_compute(sampler.schedule)", "reuses = False"),
}
"""What is done to the sampler, and the same to the twin, which has none. The twin's ``reuses`` says whether a schedule
still applies."""

MUTABLE = "MUTABLE.scale += 0.1"
"""The change of the condition that can be changed."""


def changes_of(features: Sequence[str]) -> dict[str, str]:
    """Return the changes that a program of these features may undergo, but those of its holders."""
    own = {name: text for feature in features for name, text in FEATURES[feature].changes.items()}
    if any(FEATURES[feature].values for feature in features):
        own["condition object"] = MUTABLE
    return {**WEIGHTS, **MODULES, **own}
