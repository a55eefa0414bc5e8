"""The operators that the graph of a saved sampler may call; all others are refused, when it is saved and when read.

A file may come from a stranger, and several hundred of torch's operators believe what they are given: they write to
indices, read as many statistics, or return the memory, that an argument names. So what a file may call is a list of
names, and not what torch happens to have. An operator belongs in it if a denoiser or a loop may plausibly call it, and

- it writes into nothing, touches no file, and returns a number of tensors that is known beforehand,
- no element of a tensor makes it read or write out of bounds: torch compares indices with sizes in each call,
- sizes, strides and other numbers cannot either: torch compares them, or ``operands.py`` does,
- all that it returns was computed: what makes memory without values is read as what makes zeros (``initialised``).

Gradients, sparse, nested and quantised tensors, and layouts of one library are left out. The bench ``forged-graphs``
tries the list.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch._ops import OpOverload

aten = torch.ops.aten

_POINTWISE = """
    abs absolute acos acosh add addcdiv addcmul __and__ angle arccos arccosh arcsin arcsinh arctan arctan2 arctanh
    asin asinh atan atan2 atanh bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift
    bitwise_xor ceil celu clamp clamp_max clamp_min clip complex conj _conj conj_physical _conj_physical copysign
    cos cosh deg2rad digamma div divide elu eq erf erfc erfinv exp exp2 expm1 fix float_power floor floor_divide
    fmax fmin fmod frac frexp ge gelu gelu_backward glu greater greater_equal gt hardshrink hardsigmoid hardswish
    hardtanh heaviside hypot i0 igamma igammac imag isclose isfinite isinf isnan isneginf isposinf isreal ldexp le
    leaky_relu lerp less less_equal lgamma log log10 log1p log2 log_sigmoid log_sigmoid_forward logaddexp logaddexp2
    logical_and logical_not logical_or logical_xor logit __lshift__ lt masked_fill max maximum min minimum mish mul
    multiply nan_to_num ne neg _neg_view negative nextafter not_equal __or__ polar positive pow prelu _prelu_kernel
    rad2deg real reciprocal relu relu6 remainder resolve_conj resolve_neg round rrelu __rshift__ rsqrt rsub selu sgn
    sigmoid sigmoid_backward sign signbit silu silu_backward sin sinc sinh softplus softshrink special_entr
    special_erf special_erfc special_erfcx special_erfinv special_exp2 special_expit special_expm1 special_gammaln
    special_i0 special_i0e special_i1 special_i1e special_log1p special_log_ndtr special_logit special_ndtr
    special_ndtri special_round special_sinc special_xlog1py special_xlogy sqrt square sub subtract tan tanh
    tanh_backward threshold threshold_backward true_divide trunc where xlogy __xor__
"""

_VIEWS = """
    adjoint alias as_strided atleast_1d atleast_2d atleast_3d broadcast_tensors broadcast_to chunk contiguous detach
    diagonal dsplit expand expand_as flatten hsplit lift_fresh linalg_diagonal mH mT matrix_H meshgrid moveaxis
    movedim narrow numpy_T permute ravel reshape reshape_as select slice split split_with_sizes squeeze swapaxes
    swapdims t tensor_split transpose unbind unflatten unfold unsafe_chunk unsafe_split unsafe_split_with_sizes
    _unsafe_view unsqueeze view view_as view_as_complex view_as_real vsplit
"""

_COPIES = """
    alias_copy block_diag cat channel_shuffle clone column_stack concat concatenate constant_pad_nd copy detach_copy
    diag diag_embed diagflat diagonal_copy diagonal_scatter dstack expand_copy fill flip fliplr flipud hstack
    lift_fresh_copy masked_scatter narrow_copy native_channel_shuffle pad _pad_circular _pad_enum permute_copy
    pixel_shuffle pixel_unshuffle reflection_pad1d reflection_pad2d reflection_pad3d repeat replication_pad1d
    replication_pad2d replication_pad3d roll rot90 row_stack select_copy select_scatter slice_copy slice_scatter
    squeeze_copy stack t_copy tile to _to_copy transpose_copy tril triu type_as unfold_copy unsqueeze_copy
    view_as_complex_copy view_as_real_copy view_copy vstack zero
"""

_NEW = """
    arange bartlett_window blackman_window empty empty_like eye fft_fftfreq fft_rfftfreq full full_like
    hamming_window hann_window kaiser_window linspace logspace new_empty new_full new_ones new_zeros ones ones_like
    scalar_tensor tril_indices triu_indices zeros zeros_like
"""

_RANDOM = """
    alpha_dropout bernoulli dropout exponential feature_alpha_dropout feature_dropout multinomial native_dropout
    normal normal_functional rand rand_like randint randint_like randn randn_like randperm uniform
"""

_REDUCTIONS = """
    all amax amin aminmax any argmax argmin argsort cosine_similarity count_nonzero cummax cummin cumprod cumsum
    cumulative_trapezoid diff dist frobenius_norm kthvalue linalg_matrix_norm linalg_norm linalg_vector_norm
    log_softmax _log_softmax logcumsumexp logsumexp mean median mode msort nanmean nanmedian nanquantile nansum
    native_norm norm norm_except_dim nuclear_norm pairwise_distance prod quantile renorm _safe_softmax softmax
    _softmax sort special_log_softmax special_logsumexp special_softmax std std_mean sum sum_to_size topk trace
    trapezoid trapz var var_mean
"""

_INDEXED = """
    bucketize embedding gather index index_add index_copy index_fill index_put index_reduce index_select isin
    max_unpool2d max_unpool3d one_hot put repeat_interleave scatter scatter_add scatter_reduce searchsorted take
    take_along_dim
"""

_PRODUCTS = """
    addbmm addmm _addmm_activation addmv addr baddbmm bilinear bmm cdist _cdist_forward chain_matmul conv1d conv2d
    conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution _convolution cross dot einsum
    _euclidean_dist ger inner kron linalg_cross linalg_matmul linalg_multi_dot linalg_vecdot linear matmul mm mv
    outer scaled_dot_product_attention _scaled_dot_product_attention_math
    _scaled_dot_product_flash_attention_for_cpu tensordot _trilinear vdot
"""

_LAYERS = """
    adaptive_avg_pool1d _adaptive_avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool3d
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d affine_grid_generator avg_pool1d avg_pool2d
    avg_pool3d batch_norm _batch_norm_no_update binary_cross_entropy binary_cross_entropy_with_logits col2im
    _fused_rms_norm grid_sampler grid_sampler_2d grid_sampler_3d group_norm gru gru_cell huber_loss im2col
    instance_norm kl_div l1_loss layer_norm lstm lstm_cell max_pool1d max_pool1d_with_indices max_pool2d
    max_pool2d_with_indices max_pool3d max_pool3d_with_indices mse_loss native_batch_norm _native_batch_norm_legit
    _native_batch_norm_legit_no_training native_group_norm native_layer_norm _native_multi_head_attention rms_norm
    rnn_relu rnn_relu_cell rnn_tanh rnn_tanh_cell smooth_l1_loss _transformer_encoder_layer_fwd upsample_bicubic2d
    _upsample_bicubic2d_aa upsample_bilinear2d _upsample_bilinear2d_aa upsample_linear1d upsample_nearest1d
    upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d upsample_trilinear3d _weight_norm _weight_norm_interface
"""

_LINEAR_ALGEBRA = """
    cholesky cholesky_inverse cholesky_solve det inverse linalg_cholesky linalg_cholesky_ex linalg_det _linalg_det
    linalg_eigh _linalg_eigh linalg_eigvalsh linalg_householder_product linalg_inv linalg_inv_ex linalg_matrix_exp
    linalg_matrix_power linalg_pinv linalg_qr linalg_slogdet _linalg_slogdet linalg_solve linalg_solve_ex
    _linalg_solve_ex linalg_solve_triangular linalg_svd _linalg_svd linalg_svdvals logdet matrix_exp matrix_power
    orgqr pinverse slogdet
"""

_FOURIER = """
    _fft_c2c _fft_c2r fft_fft fft_fft2 fft_fftn fft_fftshift fft_hfft fft_ifft fft_ifft2 fft_ifftn fft_ifftshift
    fft_ihfft fft_irfft fft_irfft2 fft_irfftn _fft_r2c fft_rfft fft_rfft2 fft_rfftn istft stft
"""


# Ours that passes put into a graph. Marks are gone when it is finished, and packed weights are made by the machine that
# multiplies with them.
_OURS = "cached_residual cached_residual_norm pack_cache"

ALLOWED = frozenset(
    f"aten::{name}"
    for names in (
        *(_POINTWISE, _VIEWS, _COPIES, _NEW, _RANDOM, _REDUCTIONS, _INDEXED, _PRODUCTS, _LAYERS, _LINEAR_ALGEBRA),
        _FOURIER,
    )
    for name in names.split()
) | {f"l2c::{name}" for name in _OURS.split()}
"""The names of the operators, without overloads."""

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128, torch.complex64, torch.complex32),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    torch.bool,
)
"""The dtypes of tensors in a file."""

CUTS = frozenset(
    {aten.split, aten.split_with_sizes, aten.unsafe_split, aten.unsafe_split_with_sizes, aten.unbind, aten.chunk}
    | {aten.unsafe_chunk, aten.tensor_split, aten.hsplit, aten.vsplit, aten.dsplit, aten.meshgrid}
    | {aten.broadcast_tensors, aten.atleast_1d, aten.atleast_2d, aten.atleast_3d}
)
"""The operators that return a list: of as many tensors as they are given, or of as many as ``operands.py`` counts."""

_NAME = re.compile(r"(aten|prims|l2c)::([A-Za-z0-9_]+)(?:\.([A-Za-z0-9_]+))?", re.ASCII)

_ZEROS: Mapping[OpOverload, OpOverload] = {
    aten.empty.memory_format: aten.zeros.default,
    aten.empty_like.default: aten.zeros_like.default,
    aten.new_empty.default: aten.new_zeros.default,
}


def name_of(target: OpOverload) -> str:
    """Return the name of an operator in a file: ``aten::add.Tensor``."""
    return str(target.name())  # type: ignore[no-untyped-call]


def operator_named(name: object) -> OpOverload | None:
    """Return torch's operator of a name in a file; None if there is none."""
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        return None
    namespace, base, overload = match.groups()
    packet = getattr(getattr(torch.ops, namespace), base, None)
    target = getattr(packet, overload or "default", None)
    return target if isinstance(target, OpOverload) else None


def initialised(target: OpOverload) -> OpOverload:
    """Return the operator that is called in the place of one that returns memory as it finds it: zeros."""
    return _ZEROS.get(target, target)


def why_refused(target: object) -> str | None:
    """Return why a file may not call an operator, whatever it is given; None if it may."""
    if not isinstance(target, OpOverload):
        return "is no operator of torch"
    schema = target._schema
    if not _NAME.fullmatch(name_of(target)):
        return "is an operator of another library"
    if schema.is_mutable:
        return "writes into an argument"
    if any(argument.name == "filename" for argument in schema.arguments):
        return "touches files"
    if any(each.name == "dtype" and "ScalarType" not in str(each.real_type) for each in schema.arguments):
        return "takes any number for a dtype"
    types = {str(result.type) for result in schema.returns}
    if types != {"Tensor"} and not (types == {"List[Tensor]"} and target.overloadpacket in CUTS):
        return "returns something else than a fixed number of tensors"
    if schema.name not in ALLOWED:
        return "is none of the operators that a file may call, because torch may believe what a stranger gives it"
    return None
