"""The plan of a street: lanes, verges, pavements, gardens and the cross street."""

from typing import NamedTuple

from numpy.random import Generator


class Side(NamedTuple):
    """One side of the street; distances in metres from the middle of the camera's lane."""

    sign: int  # -1 left, 1 right
    parking: bool  # whether there is a lane of parked cars
    road: float  # end of the road
    verge: float  # end of the strip of grass; end of the kerb if there is no grass
    pavement: float  # end of the pavement
    facade: float  # front of the buildings; gardens lie between pavement and facade

    def x(self, distance: float) -> float:
        """Return a distance on this side as metres to the right of the camera's lane."""
        return self.sign * distance


class Street(NamedTuple):
    """The plan of a street; lengths in metres."""

    lane: float
    lanes_left: int  # lanes of oncoming traffic
    lanes_right: int  # lanes in the camera's direction; the leftmost is the camera's lane
    sides: tuple[Side, Side]
    crossing: float | None  # distance at which a cross street begins
    crossing_width: float
    bend: float  # at distance z, the street is shifted by `bend * z * z` to the right
    suburb: bool
    greenery: float  # 0 to 1, density of trees
    bustle: float  # 0 to 1, density of people and vehicles
    tram: bool

    def is_clear(self, z: float) -> bool:
        """Return whether distance `z` is outside the cross street and its zebra crossing."""
        return self.crossing is None or not self.crossing - 6 < z < self.crossing + self.crossing_width + 2

    def beyond_crossing(self, z: float, length: float) -> float:
        """Return `z`, or the end of the cross street if an object of this length at `z` would stand in it."""
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
