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


def test_models_and_batch_sizes_learn_apart():
    first, second = make_model(num_nextn_predict_layers=1), make_model(num_nextn_predict_layers=1)
    assert make_depth("auto", first, 3) is make_depth("auto", first, 4)
    assert make_depth("auto", first, 5) is not make_depth("auto", first, 4)
    assert make_depth("auto", first, 4) is not make_depth("auto", second, 4)
    assert make_depth(None, first, 4).next() == 1
