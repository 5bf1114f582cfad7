import numpy as np
import pytest

from galembed.runtimes import Embedded
from galembed.runtimes.lanes import embed_in_parts, nothing, part_sizes


@pytest.mark.parametrize("largest", [1, 32, 128])
@pytest.mark.parametrize("images", [0, 1, 2, 7, 63, 64, 65, 128, 300, 1000])
def test_parts_are_powers_of_two_that_make_up_the_batch(images: int, largest: int) -> None:
    sizes = part_sizes(images, largest)
    assert sum(sizes) == images
    assert all(size & (size - 1) == 0 and 0 < size <= largest for size in sizes)
    assert sizes == sorted(sizes, reverse=True)
    assert images < 64 or len(sizes) > 1


class CountingLane:
    """Gives back the first pixel of each image."""

    flying = most = 0

    def start(self, images: np.ndarray, kind: str) -> None:
        self._images = images
        CountingLane.flying += 1
        CountingLane.most = max(self.most, self.flying)

    def finish(self) -> Embedded:
        CountingLane.flying -= 1
        first = self._images[:, 0].astype(np.float32)
        return Embedded(first[:, None], first, first[:, None])


@pytest.mark.parametrize("sizes", [[], [1], [4, 2, 1], [4, 4, 4, 2, 1]])
def test_parts_come_back_in_order_with_two_in_flight(sizes: list[int]) -> None:
    images = np.arange(2 * sum(sizes)).reshape(-1, 2)
    CountingLane.flying = CountingLane.most = 0
    done = embed_in_parts([CountingLane(), CountingLane()], images, "flux", sizes, nothing(1, 1))
    np.testing.assert_array_equal(done.norms, images[:, 0])
    assert done.vectors.shape == done.predictions.shape == (len(images), 1)
    assert CountingLane.most == min(2, len(sizes))
    assert CountingLane.flying == 0
