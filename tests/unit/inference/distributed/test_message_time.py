"""What messages between stages drafts take."""

from megatron.early_exit.inference.distributed.message_time import exit_waits, module_waits
from megatron.early_exit.inference.modes.draft_gain import Waits


def test_messages_of_drafts_over_three_stages():
    # A token of the full model goes to two further stages, and the last one reports it.
    full = 3 * 2.0
    # The first stage's exit needs none; each later one is gone to, and reports.
    assert exit_waits(0, 3, 2.0) == Waits(ask=0, order=0, verify=full, full=full)
    assert exit_waits(1, 3, 2.0) == Waits(ask=4, order=0, verify=4, full=full)
    assert exit_waits(2, 3, 2.0) == Waits(ask=6, order=0, verify=2, full=full)
    # The module is ordered to draft, and answers, however many drafts there are.
    assert module_waits(3, 2.0) == Waits(ask=0, order=4, verify=full, full=full)
