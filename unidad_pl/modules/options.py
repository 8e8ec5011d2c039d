"""What configs set of :class:`~unidad_pl.modules.unidad.UniDAD`: one group per network and per loss, as in the paper.

The symbols are those of docs/method.md. Options that cannot be combined cannot be written: an ablation is a group that
is null.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from unidad_pl.checks import check_at_least, check_options, check_positive, check_whole
from unidad_pl.denoiser import DenoiserSource, as_source
from unidad_pl.discriminator import HeadKind, Reduction
from unidad_pl.losses import GANLoss, Normalizer, Weighting
from unidad_pl.sampling import GradientMode
from unidad_pl.schedules import MOST_SIGMA, MOST_STEPS
from unidad_pl.training.optimization import OptimizerOptions


@dataclass
class StudentOptions:
    """The student G and its few steps.

        >>> StudentOptions(num_steps=0)
        Traceback (most recent call last):
        ...
        ValueError: num_steps must be a whole number in [1, 10000], got 0

    Attributes:
        num_steps: K, the sampling steps.
        sigma_max: sigma of the first step; null: 80. A model whose steps lie at even timesteps has its own, and so has
            a flow network unless one of the two is given.
        sigma_min: sigma of the last step; null: 0.5, or the model's own as above.
        gradient: ``unroll``, ``last`` or ``backward_simulation``, see :class:`~unidad_pl.sampling.FewStepSampler`.
        update_every: r, the student is updated on every r-th iteration.
        init_from: where G starts from instead of the source model, e.g. an already distilled student.
        optimizer: G's optimiser.
    """

    num_steps: int = 3
    sigma_max: float | None = None
    sigma_min: float | None = None
    gradient: GradientMode = "unroll"
    update_every: int = 5
    init_from: DenoiserSource | None = None
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)

    def __post_init__(self) -> None:
        check_options(self)
        check_whole(1, MOST_STEPS, num_steps=self.num_steps)
        check_whole(1, update_every=self.update_every)
        check_positive(MOST_SIGMA, sigma_max=self.sigma_max, sigma_min=self.sigma_min)
        largest, smallest = self.sigma_range
        if smallest > largest:
            raise ValueError(f"sigma_min must be at most sigma_max, got {smallest} and {largest}")
        self.init_from = self.init_from and as_source(self.init_from)

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Largest and smallest sigma, where the steps can be chosen."""
        return 80.0 if self.sigma_max is None else self.sigma_max, 0.5 if self.sigma_min is None else self.sigma_min

    @property
    def sigmas_chosen(self) -> bool:
        """Whether a sigma was given."""
        return (self.sigma_max, self.sigma_min) != (None, None)

    def refuse_sigmas(self) -> None:
        """For a network whose steps follow from their number.

        Raises:
            ValueError: a sigma was given.
        """
        if self.sigmas_chosen:
            raise ValueError(
                "student.sigma_max and student.sigma_min do nothing where the steps lie at even timesteps: leave them "
                "null, or use the source's spacing: log_linear"
            )


@dataclass
class FakeScoreOptions:
    """The fake score F, which follows the student's images.

        >>> FakeScoreOptions(optimizer=OptimizerOptions(lr=1e-3)).optimizer.warmup
        500

    Attributes:
        init_from: where F starts from instead of the source model, e.g. the fake score of an earlier distillation.
        optimizer: the optimiser of F and of the discriminator's heads.
    """

    init_from: DenoiserSource | None = None
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)

    def __post_init__(self) -> None:
        check_options(self)
        self.init_from = self.init_from and as_source(self.init_from)


@dataclass
class AdaptationOptions:
    """How the target teacher T is trained on the shots.

        >>> AdaptationOptions(until=500, update="every").updates
        1

    Attributes:
        pretrain: iterations at the start in which T alone is trained; G and F then start from what it has become: for a
            domain far from the source, where G would spend most of the run on its way. 0: none, as in the paper.
        until: T is trained in the first so many iterations only: it learns the new domain long before it knows the
            shots by heart. null: always.
        update: T is trained on the iterations that update the ``student``, or on ``every`` one.
        updates: updates of T in an iteration that trains T, each with fresh noise on the same images: T, which costs
            little beside the student, gets ahead of it.
        low_noise_share: share of T's training noise that is drawn from sigmas up to twice ``denoising.sigma_data``
            alone. Texture is what T learns last, and a handful of shots does not make T know it by heart. 0: none, as
            in the paper.
        optimizer: T's optimiser.
    """

    pretrain: int = 0
    until: int | None = None
    update: Literal["student", "every"] = "student"
    updates: int = 1
    low_noise_share: float = 0.0
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)

    def __post_init__(self) -> None:
        check_options(self)
        check_whole(0, pretrain=self.pretrain)
        check_whole(1, null=True, until=self.until)
        check_whole(1, MOST_STEPS, updates=self.updates)
        check_at_least(0, 1, low_noise_share=self.low_noise_share)
        if self.until is not None and self.pretrain > self.until:
            raise ValueError(
                f"pretrain trains T for {self.pretrain} iterations, but until ends its training after {self.until}: "
                f"set until to {self.pretrain} or more"
            )


@dataclass
class TargetTeacherOptions:
    """The target teacher T.

        >>> TargetTeacherOptions(adaptation=None)
        Traceback (most recent call last):
        ...
        ValueError: a frozen target teacher that starts from the source model is the source model: give \
target_teacher.init_from, or an adaptation

    Attributes:
        weight: a in (0, 1]: the student follows ``(1 - a) g_S + a g_T``; with ``matching.source_weight`` given, the
            weight of ``g_T`` by itself.
        init_from: where T starts from instead of the source model, e.g. an already adapted model.
        adaptation: how T is trained; null: it is frozen.
    """

    weight: float = 0.25
    init_from: DenoiserSource | None = None
    adaptation: AdaptationOptions | None = field(default_factory=AdaptationOptions)

    def __post_init__(self) -> None:
        if self.weight == 0:
            raise ValueError("target_teacher.weight (a) is 0: set target_teacher: null instead")
        check_positive(weight=self.weight)
        check_options(self)
        self.init_from = self.init_from and as_source(self.init_from)
        if self.adaptation is None and self.init_from is None:
            raise ValueError(
                "a frozen target teacher that starts from the source model is the source model: give "
                "target_teacher.init_from, or an adaptation"
            )


@dataclass
class MatchingOptions:
    """Dual-domain distribution matching (paper, eq. 3-5).

        >>> MatchingOptions(negative_prompt="blurred")
        Traceback (most recent call last):
        ...
        ValueError: negative_prompt 'blurred' does nothing without guidance: set guidance_scale above 1

    Attributes:
        source_weight: weight of ``g_S``; null: ``1 - a``. 0: the source teacher is not built.
        range: part of the noise table the sigmas are drawn from, as two fractions of its length.
        normalizer: ``clean`` or ``noisy``, see :func:`~unidad_pl.losses.dmd_gradient`.
        noise_table: ``karras`` (1000 entries, rho 7, 0.002..80) or the ``model``'s own sigmas; the denoising losses and
            the discriminator draw from it too.
        guidance_scale: classifier-free guidance of both teachers, for text-to-image models; 1: none.
        negative_prompt: what guidance leads away from; null: the empty prompt.
    """

    source_weight: float | None = None
    range: tuple[float, float] = (0.02, 0.98)
    normalizer: Normalizer = "clean"
    noise_table: Literal["karras", "model"] = "karras"
    guidance_scale: float = 1.0
    negative_prompt: str | None = None

    def __post_init__(self) -> None:
        check_options(self)
        check_at_least(0, source_weight=self.source_weight)
        check_at_least(1, guidance_scale=self.guidance_scale)
        if not 0 <= self.range[0] <= self.range[1] <= 1:
            raise ValueError(f"matching.range must be two fractions 0 <= low <= high <= 1, got {list(self.range)}")
        if self.negative_prompt is not None and self.guidance_scale == 1:
            raise ValueError(
                f"negative_prompt {self.negative_prompt!r} does nothing without guidance: set guidance_scale above 1"
            )


@dataclass
class DenoisingOptions:
    """The denoising losses of F and T (paper, eq. 6-7).

        >>> DenoisingOptions("eps")  # the plain eps-MSE
        DenoisingOptions(weighting='eps', sigma_data=0.5)

    Attributes:
        weighting: ``edm``, ``eps`` or ``flow``, see :func:`~unidad_pl.losses.denoising_weight`.
        sigma_data: standard deviation of the data in the ``edm`` weighting, and what ``low_noise_share`` goes by.
    """

    weighting: Weighting = "edm"
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        check_options(self)
        check_positive(MOST_SIGMA, sigma_data=self.sigma_data)


@dataclass
class GANOptions:
    """The multi-head GAN on F's encoder (paper, eq. 8-9).

        >>> one_head = GANOptions(taps=["mid"], loss="hinge")

    Attributes:
        student_weight: lambda_G, weight of the adversarial term in the student's loss; 0: the heads shape F alone.
        critic_weight: lambda_D, weight of the discriminator's loss beside F's denoising loss.
        taps: names of the encoder outputs that carry a head (``in0``, ``in1``, ..., ``mid``); null: all of them. What
            lies behind the deepest one is not evaluated.
        kind: ``global`` or ``patch`` logits.
        reduction: ``mean_logit`` (released code) or ``per_head`` (paper, eq. 8).
        loss: ``bce``, ``hinge``, ``lsgan`` or ``wgan``.
        noise: ``independent`` or ``shared`` sigma of the real and the generated image i of a batch.
        sigma_max: largest sigma at which the discriminator looks at images; null: the whole table. Lower values make it
            stronger, and with few shots more prone to memorising them.
        r1: weight of the R1 penalty on real images, inside the discriminator's loss; 0: none.
        gradient_penalty: weight of the WGAN-GP penalty on images between real and generated ones; 0: none.
        lr: learning rate of the heads; null: that of F.
    """

    student_weight: float = 0.015
    critic_weight: float = 0.05
    taps: list[str] | None = None
    kind: HeadKind = "global"
    reduction: Reduction = "mean_logit"
    loss: GANLoss = "bce"
    noise: Literal["independent", "shared"] = "independent"
    sigma_max: float | None = None
    r1: float = 0.0
    gradient_penalty: float = 0.0
    lr: float | None = None

    def __post_init__(self) -> None:
        check_options(self)
        check_at_least(
            0, student_weight=self.student_weight, r1=self.r1, gradient_penalty=self.gradient_penalty, lr=self.lr
        )  # fmt: skip
        if self.critic_weight == 0:
            raise ValueError("gan.critic_weight is 0: gan: null is no discriminator")
        check_positive(critic_weight=self.critic_weight)
        check_positive(MOST_SIGMA, sigma_max=self.sigma_max)


def teacher_weights(matching: MatchingOptions | None, target: TargetTeacherOptions | None) -> dict[str, float]:
    """What the student follows: the weights of ``source`` and ``target``, the teachers without one left out.

        >>> teacher_weights(MatchingOptions(), TargetTeacherOptions(weight=0.25))
        {'source': 0.75, 'target': 0.25}
        >>> teacher_weights(MatchingOptions(), None)
        {'source': 1.0}

    Raises:
        ValueError: a target teacher without matching, no teacher at all, or a > 1.
    """
    if matching is None:
        if target not in (None, TargetTeacherOptions()):
            raise ValueError("target_teacher does nothing without matching: set target_teacher: null too")
        return {}
    a = 0.0 if target is None else target.weight
    if matching.source_weight is None and a > 1:
        raise ValueError(f"target_teacher.weight (a) must be in (0, 1] unless matching.source_weight is given, got {a}")
    source = 1 - a if matching.source_weight is None else matching.source_weight
    weights = {name: weight for name, weight in (("source", source), ("target", a)) if weight > 0}
    if not weights:
        raise ValueError("matching.source_weight is 0 and target_teacher null: nothing to match, set matching: null")
    return weights
