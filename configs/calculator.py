"""The environment of grpo_calculator.toml: a calculator."""

import ast
import operator
from typing import Any

OPERATORS: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}


class Calculator:
    def reset(self, **row: Any) -> None:
        """Begin with a row of the data; this one keeps nothing."""

    def calculate(self, expression: str) -> str:
        """
        Work out an arithmetic expression.

        Args:
            expression: Numbers with +, -, *, / and brackets between them.

        Returns:
            The result.
        """
        return f"{value_of(ast.parse(expression, mode='eval').body):g}"


def value_of(node: ast.AST) -> float:
    match node:
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            return OPERATORS[type(op)](value_of(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](value_of(left), value_of(right))
    raise ValueError("only numbers with +, -, *, / and brackets can be worked out")
