"""The policy behind `num_assistant_tokens="auto"`, on costs and acceptances that are given."""

from deepseek_v3.generation.statistics import AutoDepth, MtpStatistics


def choose_depth(acceptance, costs):
    """What the policy settles on where a depth accepts so much and a step with k drafts costs so many seconds."""
    policy, statistics = AutoDepth(deepest=4, trials=3), MtpStatistics()
    statistics.drafted = [1000] * 4
    statistics.accepted = [int(1000 * rate) for rate in acceptance]
    seen = set()
    while policy.chosen is None:
        depth = policy.next()
        policy.took(depth, costs[depth] * (50 if depth not in seen else 1), statistics)  # the first step warms up
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
    costs, depths = [1.0, 1.1, 1.2, 1.3], []
    for step in range(80):
        if step == 40:
            costs = [1.0, 3.0, 5.0, 7.0]
        depths.append(policy.next())
        policy.took(depths[-1], costs[depths[-1]], statistics)
    assert depths[20:38].count(3) > 9
    assert depths[-18:].count(0) > 9
    assert depths[:40].count(0) <= 8
