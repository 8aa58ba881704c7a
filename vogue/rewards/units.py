"""Units: which words behind a number are one, and which of them are the same."""

import re

NAMES = {  # the unit, and other ways to write it; a word of its own for each: 5 m is not 500 cm
    "": "unit units",
    "%": "percent per\\s?cent",
    "deg": r"\^\\circ degree degrees deg 度",
    "degC": r"\^\\circ\s?C degrees?\sCelsius 摄氏度",
    "degF": r"\^\\circ\s?F degrees?\sFahrenheit",
    "rad": "radian radians",
    "mm": "millimeter millimeters millimetre millimetres 毫米",
    "cm": "centimeter centimeters centimetre centimetres 厘米",
    "dm": "decimeter decimeters decimetre decimetres 分米",
    "m": "meter meters metre metres 米",
    "km": "kilometer kilometers kilometre kilometres 千米 公里",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard yards",
    "mi": "mile miles",
    "mg": "milligram milligrams",
    "g": "gram grams 克",
    "kg": "kilogram kilograms kgs 千克 公斤",
    "t": "ton tons tonne tonnes 吨",
    "lb": "lbs pound pounds",
    "oz": "ounce ounces",
    "ms": "millisecond milliseconds",
    "s": "sec secs second seconds 秒",
    "min": "mins minute minutes 分钟",
    "h": "hr hrs hour hours 小时",
    "day": "days 天",
    "week": "weeks",
    "month": "months",
    "year": "years yr yrs 年",
    "mL": "ml milliliter milliliters millilitre millilitres 毫升",
    "L": "l liter liters litre litres 升",
    "K": "kelvin kelvins",
    "N": "newton newtons",
    "J": "joule joules",
    "kJ": "kilojoule kilojoules",
    "W": "watt watts",
    "kW": "kilowatt kilowatts",
    "V": "volt volts",
    "A": "ampere amperes amp amps",
    "mA": "milliampere milliamperes",
    "ohm": "ohms \\\\Omega",
    "Pa": "pascal pascals",
    "kPa": "kilopascal kilopascals",
    "Hz": "hertz",
    "mol": "mole moles",
    "mph": "miles\\sper\\shour",
    "km/h": "kmh kph",
    "USD": "dollar dollars",
    "cent": "cents",
    "EUR": "euro euros €",
    "GBP": "£",
    "CNY": "yuan 元 ¥",
    "INR": "rupee rupees ₹",
}
POWERS = {"square": "^2", "sq": "^2", "平方": "^2", "cubic": "^3", "cu": "^3", "立方": "^3"}
WAYS = [(unit, way) for unit, ways in NAMES.items() for way in [*ways.split(), *([re.escape(unit)] if unit else [])]]
CANONICAL = [(re.compile(way), unit) for unit, way in WAYS]
ANY = "|".join(sorted((way for _, way in WAYS), key=len, reverse=True))
RAISED = r"(?:\s*\^\s*\{?(-?[0-9])\}?|([23]))?"
ONE = rf"(?:(square|sq|cubic|cu|平方|立方)\.?\s*)?({ANY}){RAISED}(?![A-Za-z])"
# A letter that follows a digit at once, as in 5m, may be a variable.
BEHIND = re.compile(rf"(?:(?<=[0-9}})\]!])|(?<=\\pi))(\s*)((?:{ONE})(?:\s*(?:/|\\cdot|\bper\b)\s*(?:{ONE}))*)$")
PARTS = re.compile(rf"(^|/|\\cdot|\bper\b)\s*{ONE}")
CURRENCY = re.compile(r"^([+-]?)\s*([€£¥₹]|USD)\s*(?=[0-9.])")


def split_unit(text: str) -> tuple[str, str | None]:
    """A tidy text without the unit behind it, and that unit in one way of writing; None without one."""
    if found := CURRENCY.match(text):
        return found[1] + text[found.end() :], _canonical(found[2])
    if text.endswith("%"):
        return text[:-1].rstrip(), "%"
    behind = BEHIND.search(text)
    if behind is None or (not behind[1] and re.fullmatch("[A-Za-z]", behind[2])):
        return text, None
    unit = "".join(_part(*part) for part in PARTS.findall(behind[2]))
    return text[: behind.start()].rstrip(), unit


def _part(joined: str, power: str, name: str, raised: str, digit: str) -> str:
    exponent = POWERS.get(power) or (f"^{raised or digit}" if raised or digit else "")
    sign = {"": "", r"\cdot": "*"}.get(joined, "/")
    return f"{sign}{_canonical(name)}{exponent}"


def _canonical(name: str) -> str:
    return next(unit for way, unit in CANONICAL if way.fullmatch(name))
