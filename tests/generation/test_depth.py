"""The policy behind `num_assistant_tokens="auto"`, on costs and acceptances that are given."""

from deepseek_v3.generation.statistics import AutoDepth, MtpStatistics, make_depth
from twins import make_model


def choose_depth(acceptance, costs):
    """What the policy settles on where a depth accepts so much and a step with k drafts costs so many seconds."""
    policy, statistics = AutoDepth(deepest=4, trials=3), MtpStatistics()
    statistics.drafted = [1000] * 4
    statistics.accepted = [int(1000 * rate) for rate in acceptance]
    policy.begin(statistics)
    seen = set()
    while policy.chosen is None:
        depth = policy.next()
        policy.took(depth, costs[depth] * (50 if depth not in seen else 1))  # the first step warms up
        seen.add(depth)
    assert statistics.depth == policy.next() == policy.chosen
    return policy.chosen


def test_auto_depth_is_the_one_that_gives_most_tokens_a_second():
    cheap, dear = [1.0, 1.1, 1.2, 1.3, 1.4], [1.0, 1.6, 2.2, 2.8, 3.4]
    assert choose_depth([0.9, 0.9, 0.9, 0.9], cheap) == 4
    assert choose_depth([0.9, 0.1, 0.1, 0.1], cheap) == 1
    assert choose_depth([0.05, 0.0, 0.0, 0.0], cheap) == 0
    assert choose_depth([0.5, 0.5, 0.5, 0.5], dear) == 0
    assert choose_depth([0.8, 0.7, 0.1, 0.1], [1.0, 1.2, 1.4, 2.5, 4.0]) == 2
    assert choose_depth([0.6, 0.9, 0.1, 0.1], [1.0, 2.0, 2.1, 4.0, 4.0]) == 2  # one draft is worse than none


def test_auto_depth_follows_what_changes():
    policy, statistics = (
        AutoDepth(deepest=3, trials=2, patience=10),
        MtpStatistics(drafted=[100] * 3, accepted=[90] * 3),
    )
    policy.begin(statistics)
    costs, depths = [1.0, 1.1, 1.2, 1.3], []
    for step in range(80):
        if step == 40:
            costs = [1.0, 3.0, 5.0, 7.0]
        depths.append(policy.next())
        policy.took(depths[-1], costs[depths[-1]])
    assert depths[20:38].count(3) > 9
    assert depths[-18:].count(0) > 9
    assert depths[:40].count(0) <= 8


def call(policy, rates, costs, steps):
    """Depths that a call of so many steps takes, where drafts are accepted at `rates` and cost `costs`."""
    statistics, depths = MtpStatistics(), []
    policy.begin(statistics)
    for _ in range(steps):
        depths.append(policy.next())
        policy.took(depths[-1], costs[depths[-1]])
        statistics.drafted = [100 * (len(depths))] * 4
        statistics.accepted = [int(100 * len(depths) * rate) for rate in rates]
    return statistics.depth, depths


def test_auto_depth_goes_on_where_the_last_call_ended():
    dear, cheap = [1.0, 1.9, 2.8, 3.7, 4.6], [1.0, 1.1, 1.2, 1.3, 1.4]
    policy = AutoDepth(patience=10)
    call(policy, [0.5] * 4, dear, 30)
    chosen, depths = call(policy, [0.5] * 4, dear, 8)
    assert chosen == 0 and depths.count(0) >= 4  # nothing is tried from the beginning again
    # Another text, whose drafts are good and cheap: the past weighs little, and is overruled.
    chosen, depths = call(policy, [0.95] * 4, cheap, 120)
    assert chosen == 4 and depths[-40:].count(4) >= 20


def rows_call(policy, rates, costs, steps):
    """The depth after a call of so many steps in which row r accepts a draft at `rates`[r] and depths cost `costs`."""
    statistics = MtpStatistics()
    policy.begin(statistics)
    for step in range(steps):
        drafts, rows = policy.next(), list(range(len(rates)))
        # Each row's accepted drafts in turn, so that they are its rate on average.
        accepted = [min(drafts, int((step + 1) * rate) - int(step * rate)) for rate in rates]
        statistics.count(accepted, [right + 1 for right in accepted], drafts)
        policy.saw(rows, accepted, drafts)
        policy.took(drafts, costs[drafts])
    return statistics.depth


def test_auto_depth_counts_the_slowest_rows_tokens():
    """A call ends when its last row does: what the others accept makes it no shorter."""
    costs = [1.0, 1.3, 1.6]
    assert rows_call(AutoDepth(deepest=2, patience=10), [0.9, 0.9, 0.9, 0.9], costs, 100) == 1
    assert rows_call(AutoDepth(deepest=2, patience=10), [0.9, 0.9, 0.9, 0.0], costs, 100) == 0
    # Chance makes some row the worst one: a few drafts that it lost don't count against those of all the others.
    policy = AutoDepth(deepest=2)
    policy.begin(MtpStatistics(drafted=[1000, 900], accepted=[900, 90]))
    for step, drafts in enumerate([1] * 8 + [0] * 4 + [2] * 4):
        policy.saw([0, 1], [drafts, 0 if step < 6 else drafts], drafts)
        policy.took(drafts, costs[drafts])
    assert policy.chosen == 1


def test_auto_depth_tries_ever_less_often_what_does_not_pay():
    policy = AutoDepth(deepest=2, trials=2, patience=10)
    _, depths = call(policy, [0.1] * 2, [1.0, 2.0, 3.0], 400)
    tried = [step for step in range(20, 400) if depths[step] and not depths[step - 1]]
    gaps = [b - a for a, b in zip(tried, tried[1:], strict=False)]
    assert gaps and gaps == sorted(gaps) and max(gaps) > 80
    # Where it comes to pay again, it is seen at the next try, and looked after as before.
    chosen, depths = call(policy, [0.99] * 2, [1.0, 1.1, 1.2], 300)
    assert chosen == 2 and depths[-100:].count(2) > 60


def test_models_and_batch_sizes_learn_apart():
    first, second = make_model(num_nextn_predict_layers=1), make_model(num_nextn_predict_layers=1)
    assert make_depth("auto", first, 3) is make_depth("auto", first, 4)
    assert make_depth("auto", first, 5) is not make_depth("auto", first, 4)
    assert make_depth("auto", first, 4) is not make_depth("auto", second, 4)
    assert make_depth(None, first, 4).next() == 1
