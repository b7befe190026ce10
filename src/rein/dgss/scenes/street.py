"""The plan of a street across its width: lanes, verges, pavements, gardens and the cross street."""

from typing import NamedTuple

from numpy.random import Generator


class Side(NamedTuple):
    """One side of the street; all distances in metres from the camera's lane, towards the side."""

    sign: int  # -1 left, 1 right
    parking: bool  # a lane of parked cars
    road: float  # where the road ends
    verge: float  # where the strip of grass ends; equal to road plus kerb without one
    pavement: float  # where the pavement ends
    facade: float  # where the buildings stand; a garden lies between

    def x(self, distance: float) -> float:
        """Return metres right of the camera's lane."""
        return self.sign * distance


class Street(NamedTuple):
    """The plan of a street; metres."""

    lane: float
    lanes_left: int  # lanes of oncoming traffic
    lanes_right: int  # lanes in the camera's direction, its own the leftmost
    sides: tuple[Side, Side]
    crossing: float | None  # where a cross street begins
    crossing_width: float
    bend: float  # the middle lies `bend * z * z` to the right at distance z
    suburb: bool
    greenery: float  # 0 to 1
    bustle: float  # 0 to 1
    tram: bool

    def is_clear(self, z: float) -> bool:
        """Return whether a place along the street is outside the cross street and its zebra crossing."""
        return self.crossing is None or not self.crossing - 6 < z < self.crossing + self.crossing_width + 2

    def beyond_crossing(self, z: float, length: float) -> float:
        """Return z, or where the cross street ends if something that long would stand in it."""
        if self.crossing is None or z > self.crossing + self.crossing_width or z + length < self.crossing - 5:
            return z
        return self.crossing + self.crossing_width + 1.0


def plan_street(random: Generator) -> Street:
    """Draw the plan of a street."""
    suburb = random.random() < 0.4
    lane = random.uniform(3.0, 3.6)
    lanes_left, lanes_right = (1 + int(random.random() < share) for share in (0.3, 0.4))
    parking_left, parking_right = random.random() < 0.6, random.random() < 0.6
    tram = random.random() < 0.12
    sides = []
    for sign, lanes, parking in ((-1, lanes_left + 0.5, parking_left), (1, lanes_right - 0.5, parking_right)):
        road = lanes * lane + (2.2 if parking else 0.5)
        verge = road + 0.2 + (random.uniform(1.3, 2.4) if random.random() < 0.45 else 0.0)
        pavement = verge + random.uniform(2.2, 4.2)
        garden = random.uniform(2.5, 6.0) if suburb else (random.uniform(1, 3) * (random.random() < 0.2))
        sides.append(Side(sign, parking, road, verge, pavement, pavement + garden + 0.1))
    return Street(
        lane=lane,
        lanes_left=lanes_left,
        lanes_right=lanes_right,
        sides=(sides[0], sides[1]),
        crossing=random.uniform(17.0, 42.0) if random.random() < 0.55 else None,
        crossing_width=random.uniform(7.0, 11.0),
        bend=random.uniform(-1, 1) ** 3 * 0.0022,
        suburb=suburb,
        greenery=random.uniform(0.25, 1.0),
        bustle=random.uniform(0.25, 1.0),
        tram=tram,
    )
