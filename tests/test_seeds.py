import torch

from memlib.seeds import global_stream, stream, stream_seed


def test_a_stream_is_the_same_every_time_and_different_for_every_name_seed_and_epoch():
    seeds = [stream_seed(0, "order", 1), stream_seed(0, "order", 2), stream_seed(1, "order", 1), stream_seed(0, "x", 1)]
    assert len(set(seeds)) == 4
    assert stream_seed(0, "order", 1) == seeds[0]
    first = torch.rand(5, generator=stream(3, "label_noise"))
    torch.testing.assert_close(first, torch.rand(5, generator=stream(3, "label_noise")), rtol=0, atol=0)


def test_the_seed_of_a_stream_fits_a_generator():
    assert all(0 <= stream_seed(s, "order") < 2**63 for s in range(100))


def test_a_block_on_its_own_stream_leaves_the_global_stream_untouched():
    before = torch.get_rng_state()
    with global_stream(0, "dropout", 1, device=torch.device("cpu")):
        first = torch.rand(3)
    assert torch.equal(before, torch.get_rng_state())
    with global_stream(0, "dropout", 1, device=torch.device("cpu")):
        assert torch.equal(first, torch.rand(3))
