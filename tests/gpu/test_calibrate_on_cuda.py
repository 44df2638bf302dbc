"""Calibration's maps on a GPU, where a slice of rows is larger than on a CPU."""

import pytest
import torch

from seerattention.calibration.gains import record
from seerattention.measure import bundled
from seerattention.policies import TopK

pytestmark = pytest.mark.gpu


def test_recorded_rows_are_those_of_a_cpu():
    model, tokenizer = bundled.load_teacher()
    gates, window = bundled.load_teacher_gates(), bundled.text_tokens(tokenizer)[1][:4000]
    there = record(model, gates, [window], TopK(1.0, sink_blocks=1))
    here = record(model.cuda(), gates.cuda(), [window], TopK(1.0, sink_blocks=1))
    torch.testing.assert_close(here.mass, there.mass, rtol=1e-3, atol=1e-5)
    # Blocks of nearly the same share may change places, which moves gain from one to the other.
    torch.testing.assert_close(here.gain.sum(-1), there.gain.sum(-1), rtol=1e-3, atol=1e-6)
    acausal = torch.arange(63) > here.rows[:, None]
    assert here.gain[:, acausal].eq(0).all()
