"""Where to look next for the crossing of a loss curve that costs a forward pass a point.

Let f(η) = L(η) - L(0) and s = -f'(0) the slope at which it starts down. On a quadratic loss
f(η) = -s η + s η² / η_c, so with x = ln η

    G(x) = ln(1 + f(η) / (s η)) = x - ln η_c :

a straight line of slope 1 whose root is the critical learning rate. One point gives it exactly. On other
curves G is close to a line where it matters, over decades of η, and the secant through the nearest points
finds the root. Where G is no line (a network at initialization leaves its first slope behind at a thousandth of
η_c) the jumps are bounded below, so that a bad model cannot creep, and halving in x takes over if the
bracket does not shrink.
"""

import math

# Chosen on seeds 100 to 107 of recipes/studies/search_cases.py, guesses wrong by 1.1 to 200 times. They set the
# cost, not the answer: halving or doubling one changes the mean number of evaluations there by under a tenth.
_LARGEST_JUMP = math.log(256)  # of a model that can be trusted
_FIRST_JUMP = math.log(64)  # without one, from the guess, either way
_NEXT_JUMP_DOWN, _NEXT_JUMP_UP = math.log(3), math.log(64)
_NEAR = 0.3  # a rise below this fraction of L(0) is near the crossing
_FAR = math.log(16)  # a network's loss never rises like a parabola as far above its crossing as this
_ASIDE = 0.3  # how far beside the estimated crossing to try, in widths of the wanted bracket


class Curve:
    """The points of a loss curve tried so far, and the next one to try.

    Args:
        start: L(0).
        slope: s, positive, if known.
        rtol: Relative width of the bracket wanted.
    """

    def __init__(self, start: float, slope: float | None, rtol: float) -> None:
        self.start = start
        self.slope = slope
        self.width = math.log1p(rtol)
        self.points: list[tuple[float, float]] = []  # x = ln η and f / η, in the order tried
        self.lower, self.upper = -math.inf, math.inf  # in x; where f <= 0 below `upper`, and where f > 0
        self._widths: list[float] = []

    def add(self, eta: float, loss: float, rises: bool) -> None:
        """Take in L(`eta`) = `loss`."""
        x = math.log(eta)
        self.points.append((x, (loss - self.start) / eta))
        if rises:
            self.upper = x
        else:
            self.lower = x

    @property
    def closed(self) -> bool:
        """Whether the bracket is as narrow as wanted."""
        return self.upper - self.lower <= self.width * (1 + 1e-9)

    def restart(self, eta: float, loss: float) -> None:
        """Take in L(`eta`) as a fall below points that were no rises before it was known."""
        self.add(eta, loss, rises=False)
        self.upper = min(x for x, h in self.points if h > 0 and x > self.lower)

    def parabola_lower(self) -> float | None:
        """A lower end that needs no evaluation: slope and two losses share a parabola, to 1e-4 of the width."""
        if self.slope is None or len(self.points) < 2 or self.points[-1][0] != self.upper:
            return None
        roots = [x - g for x, g in self._line(self.slope)[-2:]]
        agree = len(roots) == 2 and abs(roots[0] - roots[1]) < 1e-4 * self.width
        lower = self.upper - self.width
        return lower if agree and lower < roots[1] < self.upper else None

    def crossing(self) -> float:
        """The best estimate of the crossing inside the bracket."""
        if all(x != self.lower for x, _ in self.points) and self.slope is not None:
            x, g = self._line(self.slope)[-1]  # on the parabola
            return math.exp(x - g)
        estimate = self._inside()
        return math.exp((self.lower + self.upper) / 2 if estimate is None else estimate)

    def next(self) -> float:
        """The η to try next."""
        if math.isfinite(self.lower) and math.isfinite(self.upper):
            return math.exp(self._between())
        return math.exp(self._beyond(self.upper, -1) if math.isfinite(self.upper) else self._beyond(self.lower, 1))

    def _line(self, slope: float) -> list[tuple[float, float]]:
        """The points as (x, G)."""
        ratios = [(x, 1 + h / slope) for x, h in self.points if math.isfinite(h)]
        return [(x, math.log(ratio)) for x, ratio in ratios if ratio > 1e-9]

    def _estimated_slope(self) -> float | None:
        """The slope s if known, else from the points of smallest η, where f / η is a line."""
        if self.slope is not None:
            return self.slope
        finite = sorted(p for p in self.points if math.isfinite(p[1]))
        if len(finite) >= 2:
            (x, h), (y, k) = finite[:2]
            ratio = math.exp(y - x)
            slope = -(h * ratio - k) / (ratio - 1)
            if slope > max(0.0, -h):
                return slope
        return -1.02 * finite[0][1] if finite and finite[0][1] < 0 else None

    def _outside(self, end: float) -> tuple[float | None, bool]:
        """The crossing beyond `end`, the last point tried, and whether the estimate can be trusted."""
        slope = self._estimated_slope()
        line = self._line(slope) if slope else []
        nearest = sorted(line, key=lambda point: abs(point[0] - end))[:2]
        if not nearest or nearest[0][0] != end:
            return None, False
        g = nearest[0][1]
        if len(nearest) == 1:
            rise = self.points[-1][1] * math.exp(end)
            if rise <= 0:
                return end - g, self.slope is not None
            return end - g, rise < _NEAR * abs(self.start) or (self.slope is not None and g > _FAR)
        steepness = (nearest[1][1] - g) / (nearest[1][0] - end)
        if not 0.3 < steepness < 3:
            return None, False
        # A line that is right brings G near its root; one that only creeps there is wrong.
        return end - g / steepness, abs(g) < 0.5 * abs(nearest[1][1])

    def _beyond(self, end: float, side: int) -> float:
        """Where to try next above (`side` 1) or below (-1) the one end there is."""
        (estimate, trusted), is_first, width = self._outside(end), len(self.points) == 1, self.width
        if estimate is not None and trusted:
            if side < 0 and is_first and end - estimate > _FAR:
                return estimate + _ASIDE * width  # if this is a parabola, a second rise closes the bracket
            x = side * max(side * estimate + _ASIDE * width, side * end + 0.9 * width)
        else:
            x = end + side * (_FIRST_JUMP if is_first else _NEXT_JUMP_UP if side > 0 else _NEXT_JUMP_DOWN)
        return side * min(side * x, side * end + _LARGEST_JUMP)

    def _between(self) -> float:
        width, wanted = self.upper - self.lower, self.width
        self._widths.append(width)
        estimate = self._inside()
        x = (self.lower + self.upper) / 2 if estimate is None else estimate
        # The estimate is good to a fraction of the wanted width: try beside it, so that both ends come close, and
        # where one is close already, just so far from it that the bracket is closed if the crossing lies between.
        if self.upper - x <= x - self.lower:
            x = self.upper - 0.93 * wanted if self.upper - x < 0.75 * wanted else x + _ASIDE * wanted
        else:
            x = self.lower + 0.93 * wanted if x - self.lower < 0.75 * wanted else x - _ASIDE * wanted
        for end, side in ((self.upper, -1), (self.lower, 1)):
            closing = end + side * 0.93 * wanted
            if wanted < abs(end - x) < 1.5 * wanted and estimate is not None and side * (estimate - closing) < 0:
                x = closing
        if len(self._widths) > 3 and width > self._widths[-4] / 8 and min(self.upper - x, x - self.lower) > wanted:
            self._widths.clear()
            x = (self.lower + self.upper) / 2
        return min(max(x, self.lower + 0.02 * width), self.upper - 0.02 * width)

    def _inside(self) -> float | None:
        """The crossing between the ends: the secant, bent through the nearest third point."""
        lowest = next(h for x, h in self.points if x == self.lower)
        slope = self._estimated_slope()
        if slope is None or -lowest < 0.5 * slope:
            slope = -2.5 * lowest  # the first slope says nothing here any more
        line = self._line(slope) if slope > 0 else []
        ends = [[point for point in line if point[0] == x] for x in (self.lower, self.upper)]
        if not all(ends):
            return None
        (a, g_a), (b, g_b) = ends[0][0], ends[1][0]
        if g_b <= g_a:
            return None
        secant = (g_b - g_a) / (b - a)
        root = a - g_a / secant
        others = [point for point in line if point[0] not in (a, b)]
        if not others:
            return root
        c, g_c = min(others, key=lambda point: abs(point[0] - root))
        bend = ((g_c - g_b) / (c - b) - secant) / (c - a)
        x = root
        for _ in range(10):
            value = g_a + secant * (x - a) + bend * (x - a) * (x - b)
            rise = secant + bend * (2 * x - a - b)
            if rise <= 0 or not a < x - value / rise < b:
                return root
            x -= value / rise
        return x
