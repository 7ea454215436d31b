"""torch's own samples and errors of its operators, without the hypothesis profile that their import loads."""

from hypothesis import settings

_ours = settings.get_current_profile_name()

from torch.testing._internal import common_methods_invocations as invocations  # noqa: E402, F401
from torch.testing._internal import common_modules  # noqa: E402, F401

settings.load_profile(_ours)
