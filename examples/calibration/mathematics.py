"""Worked problems for the calibration text: the numbers are drawn and every step is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from random import Random


def problems(seed: int) -> Iterator[str]:
    """Endless worked problems, the kinds taking turns; the same for the same seed."""
    random = Random(seed)
    while True:
        kinds = list(KINDS)
        random.shuffle(kinds)
        for kind in kinds:
            yield kind(random)


def _signed(value: int | Fraction, symbol: str = "") -> str:
    """`+ 3x` or `- 3x`: a term that follows another."""
    size = abs(value)
    shown = symbol if size == 1 and symbol else f"{_latex(size)}{symbol}"
    return f"{'-' if value < 0 else '+'} {shown}"


def _first(value: int | Fraction, symbol: str = "") -> str:
    """`3x` or `-3x`: a term that leads."""
    return _signed(value, symbol).replace("+ ", "").replace("- ", "-")


def _latex(value: int | Fraction) -> str:
    value = Fraction(value)
    if value.denominator == 1:
        return str(value.numerator)
    sign = "-" if value < 0 else ""
    return rf"{sign}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def _polynomial(coefficients: list[int] | list[Fraction], variable: str = "x") -> str:
    """Highest power first."""
    terms: list[str] = []
    for power, value in zip(range(len(coefficients) - 1, -1, -1), coefficients, strict=True):
        if value:
            symbol = "" if power == 0 else variable if power == 1 else f"{variable}^{{{power}}}"
            terms.append(_signed(value, symbol) if terms else _first(value, symbol))
    return " ".join(terms) or "0"


def _nonzero(random: Random, low: int, high: int) -> int:
    return random.choice([value for value in range(low, high + 1) if value])


def linear_equation(random: Random) -> str:
    x, a, c = random.randint(-12, 12), random.randint(6, 14), random.randint(2, 4)
    b = _nonzero(random, -20, 20)
    d = (a - c) * x + b
    return (
        f"Solve ${a}x {_signed(b)} = {c}x {_signed(d) if d else '+ 0'}$.\n"
        f"Subtract ${c}x$ from both sides: ${a - c}x {_signed(b)} = {d}$. "
        f"{'Subtract' if b > 0 else 'Add'} ${abs(b)}$: ${a - c}x = {d - b}$. Divide by ${a - c}$: $x = {x}$.\n"
        f"Check: the left side is ${a} \\cdot ({x}) {_signed(b)} = {a * x + b}$ and the right side is "
        f"${c} \\cdot ({x}) {_signed(d)} = {c * x + d}$."
    )


def quadratic(random: Random) -> str:
    a, r, s = random.randint(1, 4), random.randint(-9, 9), random.randint(-9, 9)
    b, c = -a * (r + s), a * r * s
    discriminant = b * b - 4 * a * c
    root = math.isqrt(discriminant)
    return (
        f"Find the roots of ${_polynomial([a, b, c])} = 0$.\n"
        f"The discriminant is $b^2 - 4ac = {b * b} - 4 \\cdot {a} \\cdot ({c}) = {discriminant}$, "
        f"and its square root is ${root}$. Hence\n"
        f"\\[ x = \\frac{{{-b} \\pm {root}}}{{{2 * a}}}, \\qquad x_1 = {max(r, s)}, \\quad x_2 = {min(r, s)}. \\]\n"
        f"Their sum is ${r + s} = -b/a$ and their product is ${r * s} = c/a$, as it should be."
    )


def euclid(random: Random) -> str:
    common = random.randint(2, 30)
    a, b = common * random.randint(20, 90), common * random.randint(5, 60)
    lines, x, y = [], max(a, b), min(a, b)
    while y:
        lines.append(f"{x} = {x // y} * {y} + {x % y}")
        x, y = y, x % y
    return (
        f"Compute gcd({a}, {b}) with Euclid's algorithm.\n"
        + "\n".join(lines)
        + f"\nThe last remainder that is not zero is {x}, so gcd({a}, {b}) = {x} and "
        f"lcm({a}, {b}) = {a} * {b} / {x} = {a * b // x}."
    )


def derivative(random: Random) -> str:
    n, a, b, k = random.randint(2, 6), random.randint(1, 9), _nonzero(random, -9, 9), random.randint(2, 7)
    inner = f"{_first(a, 'x')} {_signed(b)}"
    outside, function, outer = random.choice(
        [
            (f"({inner})^{{{n}}}", f"u^{{{n}}}", f"{n}u^{{{n - 1}}}"),
            (rf"\sin({inner})", r"\sin u", r"\cos u"),
            (rf"e^{{{inner}}}", "e^u", "e^u"),
            (rf"\ln({inner})", r"\ln u", r"\frac{1}{u}"),
        ]
    )
    return (
        f"Differentiate $f(x) = x^{{{k}}} \\cdot {outside}$.\n"
        f"Write $u = {inner}$, so $u' = {a}$ and the second factor is ${function}$, whose derivative with respect to "
        f"$x$ is ${a} \\cdot {outer}$ by the chain rule. By the product rule\n"
        f"\\[ f'(x) = {_first(k, f'x^{{{k - 1}}}')} \\cdot {function} + {_first(a, f'x^{{{k}}}')} \\cdot {outer}, "
        f"\\qquad u = {inner}. \\]"
    )


def integral(random: Random) -> str:
    degree = random.randint(2, 4)
    coefficients = [_nonzero(random, -6, 6)] + [random.randint(-8, 8) for _ in range(degree)]
    low = random.randint(-2, 1)
    high = low + random.randint(1, 3)
    anti = [Fraction(value, degree + 1 - i) for i, value in enumerate(coefficients)] + [Fraction(0)]

    def at(x: int) -> Fraction:
        return sum((value * x ** (degree + 1 - i) for i, value in enumerate(anti)), Fraction(0))

    return (
        f"Evaluate $\\int_{{{low}}}^{{{high}}} \\left({_polynomial(coefficients)}\\right) dx$.\n"
        f"An antiderivative is $F(x) = {_polynomial(anti)}$. "
        f"$F({high}) = {_latex(at(high))}$ and $F({low}) = {_latex(at(low))}$, "
        f"so the integral is ${_latex(at(high) - at(low))}$."
    )


def determinant(random: Random) -> str:
    m = [[random.randint(-6, 9) for _ in range(3)] for _ in range(3)]
    minors = [m[1][(j + 1) % 3] * m[2][(j + 2) % 3] - m[1][(j + 2) % 3] * m[2][(j + 1) % 3] for j in range(3)]
    value = sum(m[0][j] * minors[j] for j in range(3))
    rows = r" \\ ".join(" & ".join(map(str, row)) for row in m)
    verdict = "not invertible" if value == 0 else f"invertible, and $\\det A^{{-1}} = {_latex(Fraction(1, value))}$"
    return (
        f"Let \\[ A = \\begin{{pmatrix}} {rows} \\end{{pmatrix}}. \\] Find its determinant.\n"
        f"Expanding along the first row, with cofactors ${minors[0]}$, ${minors[1]}$ and ${minors[2]}$,\n"
        f"\\[ \\det A = ({m[0][0]})({minors[0]}) + ({m[0][1]})({minors[1]}) + ({m[0][2]})({minors[2]}) = {value}, \\]\n"
        f"so $A$ is {verdict}."
    )


def eigenvalues(random: Random) -> str:
    p, q = sorted(random.sample(range(-6, 8), 2))
    k = random.randint(1, 4)
    # [[p, k(q - p)], [0, q]] conjugated by [[1, 0], [1, 1]]: integer entries, known eigenvalues.
    a, b = p - k * (q - p), k * (q - p)
    c, d = p - k * (q - p) - q, k * (q - p) + q
    return (
        f"Find the eigenvalues of $M = \\begin{{pmatrix}} {a} & {b} \\\\ {c} & {d} \\end{{pmatrix}}$.\n"
        f"Trace ${a + d}$, determinant ${a * d - b * c}$, so the characteristic polynomial is "
        f"$\\lambda^2 {_signed(-(a + d), chr(92) + 'lambda') if a + d else ''} {_signed(a * d - b * c)}$. "
        f"It factors as $({_polynomial([1, -p], chr(92) + 'lambda')})({_polynomial([1, -q], chr(92) + 'lambda')})$: "
        f"$\\lambda_1 = {p}$ and $\\lambda_2 = {q}$. "
        f"They add up to the trace: ${p} {_signed(q) if q else '+ 0'} = {p + q}$."
    )


def linear_system(random: Random) -> str:
    x, y = random.randint(-9, 9), random.randint(-9, 9)
    a, b, c = random.randint(1, 7), _nonzero(random, -7, 7), random.randint(1, 7)
    d = next(value for value in (random.randint(1, 9), 11) if a * value != b * c)
    e, f = a * x + b * y, c * x + d * y
    return (
        f"Solve the system \\begin{{align*}} {_first(a, 'x')} {_signed(b, 'y')} &= {e} \\\\ "
        f"{_first(c, 'x')} {_signed(d, 'y')} &= {f} \\end{{align*}}\n"
        f"Multiply the first equation by ${d}$ and the second by ${b}$ and subtract; the terms in $y$ cancel and "
        f"${a * d - b * c}\\,x = {e * d - b * f}$, hence $x = {x}$. Put into the first equation: "
        f"${_signed(b, 'y').replace('+ ', '').replace('- ', '-')} = {e} - ({a * x})$, so $y = {y}$."
    )


def modular_power(random: Random) -> str:
    base, exponent, modulus = random.randint(2, 30), random.randint(20, 200), random.randint(11, 101)
    result, square, lines = 1, base % modulus, []
    for bit, digit in enumerate(reversed(f"{exponent:b}")):
        if digit == "1":
            result = result * square % modulus
        lines.append(f"  {base}^{1 << bit} = {square} (mod {modulus}){'  *' if digit == '1' else ''}")
        square = square * square % modulus
    return (
        f"Compute {base}^{exponent} mod {modulus} by repeated squaring. In binary, {exponent} = {exponent:b}.\n"
        + "\n".join(lines)
        + f"\nMultiplying the starred powers modulo {modulus} gives {result}."
    )


def factorization(random: Random) -> str:
    number = math.prod(random.choices([2, 2, 3, 3, 5, 7, 11, 13, 17], k=random.randint(3, 6)))
    rest, factors, steps = number, {}, []
    for prime in (2, 3, 5, 7, 11, 13, 17):
        while rest % prime == 0:
            steps.append(f"{rest} / {prime} = {rest // prime}")
            rest //= prime
            factors[prime] = factors.get(prime, 0) + 1
    shown = r" \cdot ".join(f"{p}^{{{k}}}" if k > 1 else str(p) for p, k in factors.items())
    divisors = math.prod(k + 1 for k in factors.values())
    return (
        f"Factor {number} into primes and count its divisors.\n{'; '.join(steps)}.\n"
        f"So ${number} = {shown}$, and it has "
        f"${' '.join(f'({k} + 1)' for k in factors.values())} = {divisors}$ divisors."
    )


def urn(random: Random) -> str:
    red, blue = random.randint(3, 9), random.randint(3, 9)
    draws = random.randint(2, 3)
    hits = random.randint(1, draws)
    ways = math.comb(red, hits) * math.comb(blue, draws - hits)
    total = math.comb(red + blue, draws)
    return (
        f"An urn holds {red} red and {blue} blue balls. {draws} are drawn without putting any back. "
        f"How likely is it that exactly {hits} of them {'is' if hits == 1 else 'are'} red?\n"
        f"There are $\\binom{{{red + blue}}}{{{draws}}} = {total}$ equally likely hands. Favourable are "
        f"$\\binom{{{red}}}{{{hits}}}\\binom{{{blue}}}{{{draws - hits}}} = {ways}$ of them, so the probability is "
        f"$\\frac{{{ways}}}{{{total}}} = {_latex(Fraction(ways, total))} \\approx {ways / total:.4f}$."
    )


def statistics(random: Random) -> str:
    values = [random.randint(10, 99) for _ in range(random.randint(5, 8))]
    n, total = len(values), sum(values)
    mean = Fraction(total, n)
    variance = Fraction(sum(v * v for v in values), n) - mean * mean
    ordered = sorted(values)
    median = Fraction(ordered[(n - 1) // 2] + ordered[n // 2], 2)
    return (
        f"Data: {', '.join(map(str, values))}.\nn = {n}, sum = {total}, mean = {float(mean):.3f}. "
        f"Sorted: {', '.join(map(str, ordered))}; median = {float(median):g}. The mean of the squares is "
        f"{sum(v * v for v in values) / n:.3f}, so the variance is {float(variance):.3f} and the standard deviation "
        f"{math.sqrt(variance):.3f}. The range is {ordered[-1]} - {ordered[0]} = {ordered[-1] - ordered[0]}."
    )


def interest(random: Random) -> str:
    principal, rate, years = random.randint(4, 90) * 250, random.choice([2, 2.5, 3, 4, 4.5, 6]), random.randint(3, 5)
    lines, balance = [], float(principal)
    for year in range(1, years + 1):
        earned = balance * rate / 100
        lines.append(f"Year {year}: {balance:,.2f} + {earned:,.2f} = {balance + earned:,.2f}")
        balance += earned
    return (
        f"A deposit of {principal:,} earns {rate:g}% a year, added at the end of each year. What is it worth after "
        f"{years} years?\n" + "\n".join(lines) + f"\nThe formula gives the same: {principal:,} * "
        f"{1 + rate / 100:g}^{years} = {principal * (1 + rate / 100) ** years:,.2f}."
    )


def long_division(random: Random) -> str:
    divisor, number = random.randint(7, 38), random.randint(10_000, 990_000)
    lines, rest = [], 0
    for digit in str(number):
        current = rest * 10 + int(digit)
        rest = current % divisor
        if current >= divisor:
            lines.append(f"{current} : {divisor} = {current // divisor}, remainder {rest}")
    return (
        f"Divide {number} by {divisor}.\n"
        + "\n".join(lines)
        + f"\n{number} = {number // divisor} * {divisor} + {number % divisor}."
    )


def fractions(random: Random) -> str:
    a, b = (
        Fraction(random.randint(1, 20), random.randint(3, 24)),
        Fraction(random.randint(1, 20), random.randint(3, 24)),
    )
    common = math.lcm(a.denominator, b.denominator)
    left, right = a.numerator * common // a.denominator, b.numerator * common // b.denominator
    return (
        f"Compute $ {_latex(a)} + {_latex(b)} $ and $ {_latex(a)} \\div {_latex(b)} $.\n"
        f"The least common denominator is ${common}$: "
        f"$\\frac{{{left}}}{{{common}}} + \\frac{{{right}}}{{{common}}} = \\frac{{{left + right}}}{{{common}}}"
        f" = {_latex(a + b)}$. Dividing is multiplying by the reciprocal: "
        f"${_latex(a)} \\cdot {_latex(1 / b)} = {_latex(a / b)}$."
    )


def bases(random: Random) -> str:
    number, base = random.randint(300, 60_000), random.choice([2, 3, 5, 7, 8])
    lines, rest, digits = [], number, ""
    while rest:
        lines.append(f"{rest} = {rest // base} * {base} + {rest % base}")
        digits = str(rest % base) + digits
        rest //= base
    return f"Write {number} in base {base}.\n" + "\n".join(lines) + f"\nRead upwards: {number} = ({digits})_{base}."


def geometric_series(random: Random) -> str:
    first, ratio = random.randint(1, 20), Fraction(random.randint(1, 5), random.randint(6, 9))
    total = first / (1 - ratio)
    return (
        f"Does $\\sum_{{n=0}}^\\infty {first} \\left({_latex(ratio)}\\right)^n$ converge, and to what?\n"
        f"The ratio is $q = {_latex(ratio)}$ with $|q| < 1$, so it does, to "
        f"$\\frac{{{first}}}{{1 - {_latex(ratio)}}} = {_latex(total)}$. The first four terms already add up to "
        f"${float(sum(first * ratio**n for n in range(4))):.4f}$ of ${float(total):.4f}$."
    )


def travel(random: Random) -> str:
    slow, fast, lead = random.randint(40, 70), random.randint(75, 120), random.choice([20, 30, 40, 45, 60, 90])
    hours = Fraction(slow * lead, 60) / (fast - slow)
    head_start = Fraction(slow * lead, 60)
    return (
        f"A lorry leaves at {slow} km/h; a car follows {lead} minutes later at {fast} km/h. When does it catch up?\n"
        f"In {lead} minutes the lorry covers {slow} * {lead}/60 = {float(head_start):g} km. The car gains "
        f"{fast} - {slow} = {fast - slow} km every hour, so it needs {float(head_start):g} / {fast - slow} = "
        f"{float(hours):.3f} h, about {round(hours * 60)} minutes, and by then it has driven "
        f"{float(hours * fast):.1f} km."
    )


def chinese_word_problem(random: Random) -> str:
    pens, books = random.randint(3, 12), random.randint(2, 9)
    pen, book = random.randint(2, 6), random.randint(8, 25)
    paid = (pens * pen + books * book) // 50 * 50 + 50
    return (
        f"题目：小店里一支笔 {pen} 元，一个本子 {book} 元。买 {pens} 支笔和 {books} 个本子，"
        f"付了 {paid} 元，应找回多少元？\n"
        f"解：笔共 {pens} × {pen} = {pens * pen} 元，本子共 {books} × {book} = {books * book} 元，"
        f"合计 {pens * pen} + {books * book} = {pens * pen + books * book} 元。"
        f"应找回 {paid} − {pens * pen + books * book} = {paid - pens * pen - books * book} 元。\n"
        f"答：应找回 {paid - pens * pen - books * book} 元。"
    )


def chinese_work(random: Random) -> str:
    a, b = random.sample([6, 8, 9, 10, 12, 15, 18, 20, 24, 30], 2)
    together = 1 / (Fraction(1, a) + Fraction(1, b))
    return (
        f"题目：一项工程，甲队单独做需要 {a} 天，乙队单独做需要 {b} 天。两队合作，需要多少天完成？\n"
        f"解：甲队每天完成 $\\frac{{1}}{{{a}}}$，乙队每天完成 $\\frac{{1}}{{{b}}}$，合作每天完成 "
        f"$\\frac{{1}}{{{a}}} + \\frac{{1}}{{{b}}} = {_latex(1 / together)}$，"
        f"所以需要 $1 \\div {_latex(1 / together)} = {_latex(together)}$ 天，约 {float(together):.2f} 天。"
    )


KINDS: tuple[Callable[[Random], str], ...] = (
    linear_equation,
    quadratic,
    euclid,
    derivative,
    integral,
    determinant,
    eigenvalues,
    linear_system,
    modular_power,
    factorization,
    urn,
    statistics,
    interest,
    long_division,
    fractions,
    bases,
    geometric_series,
    travel,
    chinese_word_problem,
    chinese_work,
)
