"What a cell of a chapter exports, as Sphinx's Python domain wants it: signatures and docments, read from the text without importing anything."
import ast
import inspect
import io
import re
import tokenize


def prose(text):
    "A comment or a docstring as MyST: what stands in backticks stays, nothing else is markup."
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if i % 2 else re.sub(r"([\\*_$<>\[\]{}#|~^])", r"\\\1", p) for i, p in enumerate(parts))


def docments(node, comments):
    "Pairs of an argument (or a field of a class) and its comment, and the comment of what is returned: those at the ends of their lines."
    if isinstance(node, ast.ClassDef):
        return [(n.target.id, comments.get(n.end_lineno, "")) for n in node.body if isinstance(n, ast.AnnAssign)], ""
    a = node.args
    named = [*a.posonlyargs, *a.args]
    default = dict(zip(named[len(named) - len(a.defaults):], a.defaults)) | dict(zip(a.kwonlyargs, a.kw_defaults))
    ends = {x: (default.get(x) or x).end_lineno for x in [*named, *filter(None, [a.vararg]), *a.kwonlyargs, *filter(None, [a.kwarg])]}
    alone = lambda x: list(ends.values()).count(ends[x]) == 1
    pairs = [("*" * ((x is a.vararg) + 2 * (x is a.kwarg)) + x.arg, comments[e]) for x, e in ends.items() if e in comments and alone(x)]
    last = max(ends.values(), default=node.lineno - 1)
    return pairs, next((c for line, c in comments.items() if last < line < node.body[0].lineno), "")


def describe(kind, node, signature, comments, fields, depth=3, options=()):
    "One object: its signature, docstring and a list of its arguments; the methods of a class within it."
    pairs, returned = docments(fields, comments) if fields else ([], "")
    body = [prose(inspect.cleandoc(ast.get_docstring(node) or "")), ""]
    body += [f":param {prose(name)}: {prose(c)}" for name, c in pairs if c and name not in ("self", "cls")]
    if returned: body += [f":returns: {prose(returned)}"]
    if isinstance(node, ast.ClassDef):
        for m in node.body:
            if isinstance(m, ast.FunctionDef) and m is not fields and ast.get_docstring(m) and not re.match("_[^_]", m.name): body += ["", method(m, comments)]
    fence = ":" * (depth + isinstance(node, ast.ClassDef))
    return "\n".join([f"{fence}{{py:{kind}}} {node.name}{signature}", *options, "", *body, fence])


def arguments(node, drop=0):
    "The signature as Python writes it, without the first `drop` arguments."
    fields = {f: getattr(node.args, f) for f in node.args._fields} | {"args": node.args.args[drop:]}
    short = lambda d: ast.Constant(...) if d and any(isinstance(n, ast.GeneratorExp) for n in ast.walk(d)) else d  # Sphinx reads no such default
    text = ast.unparse(ast.arguments(**fields | {f: [short(d) for d in fields[f]] for f in ("defaults", "kw_defaults")}))
    return f"({text})" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")


def method(node, comments):
    names = [ast.unparse(d) for d in node.decorator_list]
    if "property" in names: return describe("property", node, "", comments, None)
    options = [f":{n}:" for n in names if n in ("classmethod", "staticmethod")]
    return describe("method", node, arguments(node, drop=0 if ":staticmethod:" in options else 1), comments, node, options=options)


def api(source):
    "The public functions and classes of a cell: pairs of a name and its description."
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT}
    found = []
    for node in ast.parse(source).body:
        if not hasattr(node, "name") or node.name.startswith("_"): continue
        if isinstance(node, ast.FunctionDef): text = describe("function", node, arguments(node), comments, node)
        else:
            start = next((n for n in node.body if getattr(n, "name", "") == "__init__"), None)
            fields = ", ".join(ast.unparse(n) for n in node.body if isinstance(n, ast.AnnAssign))
            text = describe("class", node, arguments(start, 1) if start else f"({fields})" if fields else "", comments, start or node)
        found.append((node.name, text))
    return found
