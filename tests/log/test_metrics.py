"""The registry of metrics: one entry each, with what its readers need."""

from laser_fast.log.metrics import BENCHMARK, METRICS, RUN, STEP, SUMMARY, TILE, VOTES, shown_at


def test_every_metric_has_one_entry_with_a_key_and_a_label():
    keys = [metric.key for metric in METRICS]
    assert len(set(keys)) == len(keys)
    for metric in METRICS:
        assert metric.key == f"{metric.stage}/{metric.name}" and metric.label
        assert f"{0.5:{metric.style}}"
        # A metric that is shown nowhere needs no entry.
        assert metric.place > STEP or metric.panel or metric.line
    # An evaluation knows a metric only by its name.
    names = [metric.name for metric in shown_at(BENCHMARK)]
    assert len(set(names)) == len(names)


def test_places_contain_each_other():
    shown = [set(shown_at(place)) for place in (TILE, SUMMARY, RUN, BENCHMARK)]
    assert all(inner < outer for inner, outer in zip(shown, shown[1:], strict=False))
    assert set(shown_at(STEP)) == shown[-1]


def test_votes_are_labelled_by_their_number():
    (weighted,) = (metric for metric in VOTES if metric.name == "weighted_majority")
    assert weighted.at(8) == "weighted maj@8"
    counted = {metric for metric in METRICS if "@k" in metric.label}
    assert counted == {*VOTES} | {metric for metric in METRICS if metric.stage == "gain"}
