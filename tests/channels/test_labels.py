"""The union-find of channel labels, against the plainest one there is."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from redpp_serve.channels.labels import Labels, once
from tests.support.networks import few

pairs = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=20)


def plain(count, joined):
    """For each of the labels 0..count-1 the smallest that it is joined with, by repeated passes."""
    root = list(range(count))
    for _ in range(count):
        for a, b in joined:
            low = min(root[a], root[b])
            root = [low if r in (root[a], root[b]) else r for r in root]
    return root


@given(pairs, st.integers(1, 4))
@few
def test_union_against_brute_force(joined, batches):
    joined = [(a, b) for a, b in joined if a and b]
    labels = Labels()
    labels.fresh(12)
    for k in range(batches):
        some = torch.tensor(joined[k::batches], dtype=torch.int64).view(-1, 2)
        labels.union(some[:, 0], some[:, 1])
    found = labels.find(torch.arange(13)).tolist()
    assert found == plain(13, joined)
    assert labels.reasons() == ({}, {})


def test_fresh_labels_are_new_and_alone_however_many():
    labels = Labels()
    made = torch.cat([labels.fresh(n) for n in (1, 5000, 3, 0, 20000)])
    assert made.tolist() == list(range(1, 25005))
    assert torch.equal(labels.find(made), made)


def test_what_meets_no_channel_is_closed_and_not_joined():
    labels = Labels()
    a = labels.fresh(3)
    labels.union(a, torch.tensor([0, 0, 3]), "meets a constant")
    assert labels.find(a).tolist() == [1, 2, 3]
    assert labels.reasons() == ({1: "meets a constant", 2: "meets a constant"}, {})


def test_broadcast_operands_are_joined_pairwise():
    labels = Labels()
    a, b = labels.fresh(3).view(1, 3, 1, 1).expand(1, 3, 4, 5), labels.fresh(3).view(1, 3, 1, 1)
    labels.union(a, b)
    assert labels.find(a)[0, :, 2, 3].tolist() == labels.find(b).flatten().tolist() == [1, 2, 3]
    labels.union(a, labels.fresh(1))
    assert set(labels.find(a).flatten().tolist()) == {1}


def test_a_tie_joins_along_its_dimension_and_keeps_the_reason_for_what_it_joined():
    labels = Labels()
    a = labels.fresh(6).view(2, 3)
    labels.tie(a, 1, "one group")
    assert labels.find(a).tolist() == [[1, 1, 1], [4, 4, 4]]
    labels.tie(a, 1, "again")
    labels.tie(a.view(2, 3, 1).expand(2, 3, 7), 2, "along copies")
    assert labels.reasons() == ({}, {1: "one group", 4: "one group"})


def test_closing_goes_with_later_unions_and_the_first_reason_counts():
    labels = Labels()
    a = labels.fresh(4)
    labels.close(a[2:3].expand(5), "first")
    labels.close(a[3:], "second")
    labels.union(a[:2], a[2:])
    assert labels.reasons()[0] == {1: "first", 2: "second"}
    labels.close(torch.zeros(3, dtype=torch.int64), "of nothing")
    labels.union(a[:1], a[1:2])
    assert labels.reasons()[0] == {1: "first"}


def test_once_narrows_only_repetitions():
    a = torch.arange(6).view(1, 2, 3, 1).expand(4, 2, 3, 5)
    assert once(a).shape == (1, 2, 3, 1)
    assert once(torch.arange(1).expand(1, 1)).shape == (1, 1)


def test_a_single_number_is_found_too():
    labels = Labels()
    a = labels.fresh(2)
    labels.union(a[0], a[1])
    assert labels.find(a[1]).item() == 1 and labels.find(a[1]).shape == ()
