//! The house rules, enforced: sizes, headers, arrows between rooms, purity, unsafe, names.
//!
//! Owns every rule about the text of the sources that a program can decide. Each rule is a function
//! from one source file to its findings, runs over the whole tree in a test of its own, and is
//! itself tested on a bad sample. Reads the working tree only; never asks version control, never
//! changes a file. A rule that stands in the way is changed here, with its reason, or not at all.

use std::fs;
use std::path::Path;

/// What a test writes behind the one sleep of a poll that has a deadline.
const POLLING_MARK: &str = "// tidy: polling";
const TREES: &[&str] = &["src", "tests", "tools", "benches"];
/// Which rooms a room may name, besides config and error. A room not listed here is an error.
const ARROWS: &[(&str, &[&str])] = &[
    ("cli", &["daemon", "build", "upcall", "plug", "blob", "registry", "store", "image", "engine"]),
    ("daemon", &["upcall", "plug", "blob", "registry", "store", "image", "engine"]),
    ("upcall", &["blob", "registry", "store", "image", "engine"]),
    ("plug", &["blob", "registry", "store", "image", "engine", "tar"]),
    ("blob", &["registry", "store", "image", "engine"]),
    ("build", &["registry", "image", "engine", "tar"]),
    ("registry", &["engine"]),
    ("store", &["engine"]),
    ("image", &["engine"]),
    ("engine", &[]),
    ("tar", &[]),
    ("config", &[]),
    ("error", &[]),
];
/// Folders and the files in them, all when none is named, that are functions from value to value.
const PURE: &[(&str, &[&str])] = &[
    ("src/image/", &[]),
    ("src/registry/", &["http", "auth", "config", "reference", "origin", "mirrors", "complaint"]),
    ("src/build/", &["place", "image_config", "documents", "bootstrap_layer", "trace"]),
    ("src/blob/", &["plan", "schedule"]),
    ("src/tar/", &[]),
];
#[rustfmt::skip]
const UNSAFE_FILES: &[&str] = &["src/engine/ring.rs", "src/engine/arena.rs", "src/upcall/sys.rs",
    "src/image/inflate.rs", "src/daemon/sys.rs", "tests/support/counting.rs"];
const NO_NAMES: &[&str] = &["utils", "util", "common", "helpers", "helper", "misc"];
const NO_ENDINGS: &[&str] = &["Manager", "Handler", "Helper", "Impl"];
/// The path of samples whose path does not matter.
const FILE: &str = "src/blob/map.rs";
/// One broken rule at one line, counted from 1.
type Finding = (usize, String);

struct Source {
    path: String,
    raw: Vec<String>,
    /// As `raw`, with comments and the insides of literals blanked: braces and words are code.
    code: Vec<String>,
    /// Whether the line is test code: under tests/ or benches/, or inside `#[cfg(test)]`.
    test: Vec<bool>,
}

impl Source {
    fn new(path: &str, text: &str) -> Self {
        let code = mask(text);
        let whole = ["tests/", "benches/", "src/sim/"].iter().any(|tree| path.starts_with(tree))
            || (path.starts_with("src/") && path.ends_with("tests.rs"));
        let mut test = vec![whole; text.lines().count()];
        let marks = ["#[cfg(test)]", "#[cfg(all(test"].into_iter();
        for (start, _) in marks.flat_map(|mark| code.match_indices(mark)) {
            let end = item_end(&code, start);
            test[line_of(&code, start) - 1..line_of(&code, end)].fill(true);
        }
        let lines = |text: &str| text.lines().map(str::to_owned).collect();
        Source { path: path.to_owned(), raw: lines(text), code: lines(&code), test }
    }

    /// Lines of code with their numbers; only those of the product when `product` is set.
    fn lines(&self, product: bool) -> impl Iterator<Item = (usize, &str)> {
        let keep = move |index: usize| !(product && self.test[index]);
        let numbered = self.code.iter().enumerate().filter(move |(index, _)| keep(*index));
        numbered.map(|(index, line)| (index + 1, line.as_str()))
    }
}

/// Blanks comments and the insides of string and character literals; keeps every line break.
fn mask(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let (mut out, mut at) = (String::with_capacity(text.len()), 0);
    while at < chars.len() {
        let blank_end = blank_end(&chars, at);
        let end = blank_end.max(at + 1);
        let blank = |&c: &char| if blank_end > at && c != '\n' { ' ' } else { c };
        out.extend(chars[at..end].iter().map(blank));
        at = end;
    }
    out
}

/// The end of the comment or literal that starts at `at`; `at` itself when none does.
fn blank_end(chars: &[char], at: usize) -> usize {
    let starts = |from: usize, what: &str| {
        what.chars().enumerate().all(|(index, c)| chars.get(from + index) == Some(&c))
    };
    let find = |from: usize, what: &str| {
        (from..chars.len()).find(|&index| starts(index, what)).unwrap_or(chars.len())
    };
    let quoted_end = || {
        let mut end = at + 1;
        while end < chars.len() && chars[end] != chars[at] {
            end += if chars[end] == '\\' { 2 } else { 1 };
        }
        (end + 1).min(chars.len())
    };
    match chars[at] {
        '/' if starts(at, "//") => find(at, "\n"),
        '/' if starts(at, "/*") => (find(at + 2, "*/") + 2).min(chars.len()),
        '"' => quoted_end(),
        '\'' if chars.get(at + 1) == Some(&'\\') => quoted_end(),
        '\'' if chars.get(at + 2) == Some(&'\'') => at + 3,
        'r' if at == 0 || !is_word(chars[at - 1]) || matches!(chars[at - 1], 'b' | 'c') => {
            let hashes = chars[at + 1..].iter().take_while(|&&c| c == '#').count();
            if chars.get(at + 1 + hashes) != Some(&'"') {
                return at;
            }
            let close = format!("\"{}", "#".repeat(hashes));
            (find(at + 2 + hashes, &close) + close.len()).min(chars.len())
        }
        _ => at,
    }
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn line_of(text: &str, at: usize) -> usize {
    text[..at].matches('\n').count() + 1
}

/// The end of the item at `start` of masked code: its closing brace, or its semicolon.
fn item_end(code: &str, start: usize) -> usize {
    let (mut round, mut braces) = (0, 0);
    let step = |c, open: &str, close: &str| open.contains(c) as i32 - close.contains(c) as i32;
    for (index, c) in code[start..].char_indices() {
        round += step(c, "([", ")]");
        braces += step(c, "{", "}");
        if (c == '}' || (c == ';' && round == 0)) && braces <= 0 {
            return start + index;
        }
    }
    code.trim_end().len().max(start)
}

/// Whether `what` stands in `line`, not as a part of a longer word.
fn holds(line: &str, what: &str) -> bool {
    line.match_indices(what).any(|(at, _)| {
        let tail = what.starts_with(is_word) && line[..at].ends_with(is_word);
        let head = what.ends_with(is_word) && line[at + what.len()..].starts_with(is_word);
        !(tail || head)
    })
}

/// The one finding of a rule that is about the file as a whole.
fn whole_file(bad: bool, line: usize, what: &str) -> Vec<Finding> {
    if bad { vec![(line, what.to_owned())] } else { Vec::new() }
}

fn file_size(source: &Source) -> Vec<Finding> {
    let lines = source.raw.len();
    whole_file(lines > 500, lines, "500 lines at most: split the file by idea")
}

fn header(source: &Source) -> Vec<Finding> {
    let opens = source.raw.first().is_some_and(|line| line.starts_with("//! "));
    whole_file(!opens, 1, "open the file with its contract, `//! ...`")
}

fn depth(source: &Source) -> Vec<Finding> {
    let deep = source.path.split('/').count() > 3;
    whole_file(deep, 1, "too deep: src/room/file.rs is the deepest there is")
}

fn function_size(source: &Source) -> Vec<Finding> {
    let code = source.code.join("\n");
    let mut findings = Vec::new();
    for (start, _) in code.match_indices("fn ") {
        let named = code[start + 3..].starts_with(is_word) && !code[..start].ends_with(is_word);
        let first = line_of(&code, start);
        let lines = line_of(&code, item_end(&code, start)) - first + 1;
        if named && lines > 70 {
            findings.push((first, format!("a function of {lines} lines, 70 at most")));
        }
    }
    findings
}

fn line_width(source: &Source) -> Vec<Finding> {
    let lines = source.raw.iter().map(|line| line.chars().count()).enumerate();
    let wide = lines.filter(|(_, columns)| *columns > 100);
    wide.map(|(index, columns)| (index + 1, format!("{columns} columns, 100 at most"))).collect()
}

/// The room a file of `src` belongs to; the files of the crate's root belong to none.
fn room(path: &str) -> Option<&str> {
    let inside = path.strip_prefix("src/")?;
    let room = inside.split('/').next()?.trim_end_matches(".rs");
    (!["main", "lib", "sim"].contains(&room)).then_some(room)
}

/// The rooms that follow `prefix`, which means the crate's root, in masked code.
fn rooms_named(code: &str, prefix: &str) -> Vec<(usize, String)> {
    let mut rooms = Vec::new();
    for (at, _) in code.match_indices(prefix) {
        if code[..at].ends_with(|c| is_word(c) || c == ':') {
            continue;
        }
        let rest = &code[at + prefix.len()..];
        let grouped = rest.starts_with('{');
        let (group, count) = if grouped { (&rest[1..item_end(rest, 0)], !0) } else { (rest, 1) };
        let mut depth = 0;
        let top = |c: &char| {
            depth += i32::from(*c == '{') - i32::from(*c == '}');
            depth == 0
        };
        let names: String = group.chars().filter(top).collect();
        for name in names.split(',').take(count) {
            let name = name.trim_start().chars().take_while(|&c| is_word(c)).collect();
            rooms.push((line_of(code, at), name));
        }
    }
    rooms
}

fn arrows(source: &Source) -> Vec<Finding> {
    let Some(here) = room(&source.path) else { return Vec::new() };
    let Some((_, allowed)) = ARROWS.iter().find(|(room, _)| *room == here) else {
        return vec![(1, format!("room `{here}` has no arrows: list it in tests/tidy.rs"))];
    };
    let blank = |(line, test): (&String, &bool)| if *test { String::new() } else { line.clone() };
    let code = source.code.iter().zip(&source.test).map(blank).collect::<Vec<_>>().join("\n");
    let root = if source.path.ends_with("/mod.rs") { "super::" } else { "super::super::" };
    let named = rooms_named(&code, "crate::").into_iter().chain(rooms_named(&code, root));
    let room = |name: &str| name == "sim" || ARROWS.iter().any(|(room, _)| *room == name);
    named
        .filter(|(_, there)| {
            room(there) && there != here && !["config", "error"].contains(&there.as_str())
        })
        .filter(|(_, there)| !allowed.contains(&there.as_str()))
        .map(|(line, there)| (line, format!("`{here}` must not know `{there}`")))
        .collect()
}

fn purity(source: &Source) -> Vec<Finding> {
    let pure = PURE.iter().any(|(folder, stems)| {
        let file = source.path.strip_prefix(folder);
        file.is_some_and(|file| stems.is_empty() || stems.contains(&file.trim_end_matches(".rs")))
    });
    let banned = ["crate::engine", "std::fs", "TcpStream", "TcpListener", "UdpSocket"];
    if pure { search(source, true, &banned) } else { Vec::new() }
}

fn unsafe_code(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (number, line) in source.lines(false) {
        let used = holds(line, "unsafe");
        if used && !UNSAFE_FILES.contains(&source.path.as_str()) {
            findings.push((number, "unsafe outside the listed files".to_owned()));
        }
        let block = line.contains("unsafe {") || line.contains("unsafe impl");
        if block && !has_safety_comment(source, number) {
            findings.push((number, "unsafe without `// SAFETY:` in front".to_owned()));
        }
    }
    findings
}

/// Whether `// SAFETY:` stands in the comment above the statement that holds line `number`.
fn has_safety_comment(source: &Source, number: usize) -> bool {
    let same = |index: &usize| {
        !(source.raw[*index].trim().is_empty() || source.code[*index].trim().ends_with([';', '}']))
    };
    let mut above = (0..number - 1).rev().take_while(same);
    above.any(|index| source.raw[index].trim().starts_with("// SAFETY:"))
}

fn names(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    let parts = source.path.trim_end_matches(".rs").split('/');
    for part in parts.filter(|part| NO_NAMES.contains(part)) {
        findings.push((1, format!("`{part}` says nothing: name the idea")));
    }
    for (number, line) in source.lines(false) {
        let mut before = "";
        for word in line.split(|c| !is_word(c)).filter(|word| !word.is_empty()) {
            let kind = ["struct", "enum", "trait", "type"].contains(&before);
            let empty = kind && NO_ENDINGS.iter().any(|end| word.ends_with(end));
            if empty || (before == "fn" && word.starts_with("get_")) {
                findings.push((number, format!("the name `{word}`")));
            }
            before = word;
        }
    }
    findings
}

fn panics_and_prints(source: &Source) -> Vec<Finding> {
    let mut findings = search(source, false, &["todo!", "unimplemented!", "dbg!"]);
    let speaks = source.path == "src/main.rs" || source.path.starts_with("src/cli/");
    if source.path.starts_with("src/") {
        findings.extend(search(source, true, &[".unwrap()", ".unwrap_err()", "panic!"]));
    }
    if source.path.starts_with("src/") && !speaks {
        findings.extend(search(source, true, &["println!", "eprintln!", "print!", "eprint!"]));
    }
    findings
}

/// Lines of code that hold one of `banned`.
fn search(source: &Source, product: bool, banned: &[&str]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (number, line) in source.lines(product) {
        for what in banned.iter().filter(|what| holds(line, what)) {
            findings.push((number, format!("`{what}` does not belong here")));
        }
    }
    findings
}

fn leftovers(source: &Source) -> Vec<Finding> {
    let texts = [concat!("#[ig", "nore"), concat!("/work", "/h/"), concat!("/work", "/shared")];
    let banned = [[concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X")], texts].concat();
    let mut findings = Vec::new();
    for (index, line) in source.raw.iter().enumerate() {
        for what in banned.iter().filter(|what| holds(line, what)) {
            findings.push((index + 1, format!("`{what}` is left over")));
        }
    }
    findings
}

fn globals(source: &Source) -> Vec<Finding> {
    let mut findings = search(source, false, &["thread_local!", "static mut ", "lazy_static"]);
    for (number, line) in source.lines(false) {
        let item = line.split_whitespace().find(|word| !word.starts_with("pub")) == Some("static");
        let atomic = !source.test[number - 1] && line.contains("Atomic");
        let lazy = ["OnceLock", "LazyLock", "OnceCell", "Mutex", "RwLock"];
        if item && (atomic || lazy.iter().any(|cell| line.contains(cell))) {
            findings.push((number, "a global that changes: pass the value instead".to_owned()));
        }
    }
    findings
}

fn sleeps(source: &Source) -> Vec<Finding> {
    let mut findings = search(source, false, &["thread::sleep"]);
    findings.retain(|(number, _)| source.test[number - 1]);
    let marked = |number: usize| source.raw[number - 1].trim_end().ends_with(POLLING_MARK);
    let poll = findings.iter().position(|(number, _)| marked(*number));
    poll.map(|first| findings.remove(first));
    findings
}

/// Every source file of the tree, in order.
fn tree() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut folders: Vec<_> = TREES.iter().map(|tree| root.join(tree)).collect();
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten() {
            let path = entry.expect("a folder of the tree can be read").path();
            let name = path.strip_prefix(root).expect("it is below").display().to_string();
            if path.is_dir() && !name.starts_with("tests/fixtures") {
                folders.push(path);
            } else if name.ends_with(".rs") {
                files.push(Source::new(&name, &fs::read_to_string(&path).expect("UTF-8 text")));
            }
        }
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    assert!(files.len() > 4, "the tree was not found");
    files
}

/// Runs `rule` over the tree and over samples: every bad one must be refused, every good one not.
fn enforce(rule: fn(&Source) -> Vec<Finding>, bad: &[(&str, &str)], good: &[(&str, &str)]) {
    for (path, text) in bad {
        assert!(!rule(&Source::new(path, text)).is_empty(), "not refused: {path}: {text}");
    }
    for (path, text) in good {
        assert_eq!(rule(&Source::new(path, text)), Vec::new(), "refused: {path}: {text}");
    }
    let mut report = String::new();
    for source in tree() {
        for (line, what) in rule(&source) {
            report.push_str(&format!("{}:{line}: {what}\n", source.path));
        }
    }
    assert!(report.is_empty(), "\n{report}");
}

#[test]
fn files_have_at_most_500_lines() {
    enforce(file_size, &[(FILE, &"//\n".repeat(501))], &[(FILE, &"//\n".repeat(500))]);
}

#[test]
fn functions_have_at_most_70_lines() {
    let with = |line: &str, count: usize| format!("fn f<'a>() {{\n{}}}", line.repeat(count));
    let braces = "g('}', \"}\"); // }\n";
    let raw = "r#\"}\"#;\n/* } */\n";
    let array = with("g();\n", 69).replace("()", "() -> [u8; 4]");
    let short = "trait T { fn f(); }\n".to_owned() + &"const A: fn (u8) = g;\n".repeat(80);
    let bad = [(FILE, &*with(braces, 69)), (FILE, &array), (FILE, &with(raw, 35))];
    enforce(function_size, &bad, &[(FILE, &with(braces, 68)), (FILE, &short)]);
}

#[test]
fn lines_have_at_most_100_columns() {
    enforce(line_width, &[(FILE, &"é".repeat(101))], &[(FILE, &"é".repeat(100))]);
}

#[test]
fn files_open_with_their_contract() {
    enforce(header, &[(FILE, "// A\n"), (FILE, ""), (FILE, "\n//! A\n")], &[(FILE, "//! A\n")]);
}

#[test]
fn files_lie_at_most_two_folders_deep() {
    enforce(depth, &[("src/a/b/c.rs", ""), ("tests/a/b/c.rs", "")], &[("src/a/b.rs", "")]);
}

#[test]
fn rooms_depend_one_way() {
    let pairs = "engine>blob store>registry image>store upcall>plug build>blob error>engine \
                 plug>sim registry>image daemon>cli cellar>config";
    for (here, there) in pairs.split(' ').filter_map(|pair| pair.split_once('>')) {
        let path = format!("src/{here}/a.rs");
        let group = format!("use crate::{{error::Error,\n config::{{KIB}}, {there}}};");
        let name = format!("let a = crate::{there}::b();");
        let above = format!("use super::super::{there}::B;");
        enforce(arrows, &[(&path, &group), (&path, &name), (&path, &above)], &[]);
    }
    let bad = [("src/blob/mod.rs", "use super::daemon::Run;")];
    let tests = "// crate::blob\n#[cfg(test)]\nmod tests {\n use crate::blob::Map;\n}";
    let down = "use crate::{engine::blob, error};\nuse super::blob;\nuse crate::config::KIB;";
    let good = [("src/upcall/a.rs", down), ("src/engine/a.rs", tests), ("src/sim/a.rs", down)];
    enforce(arrows, &bad, &good);
}

#[test]
fn pure_files_do_no_io() {
    let bad = [("src/image/a.rs", "use std::fs;"), ("src/blob/plan.rs", "std::net::TcpStream")];
    let quiet = "// std::fs\n#[cfg(test)]\nuse std::fs;\n";
    let good = [("src/registry/pool.rs", "use crate::engine::Core;"), ("src/image/a.rs", quiet)];
    enforce(purity, &bad, &good);
}

#[test]
fn unsafe_stays_in_the_listed_files_and_says_why() {
    let ring = "src/engine/ring.rs";
    let late = "// SAFETY: for another one.\nlet a = f();\nlet b = unsafe { g() };";
    let bad = [(FILE, "// SAFETY: no.\nunsafe { f() }"), (ring, "unsafe { f() }"), (ring, late)];
    let split = "// SAFETY: the slot\n// is ours.\nlet a =\n    unsafe { f() };";
    let good = [(ring, split), (FILE, "#![deny(unsafe_code)]"), (FILE, "// unsafe\n\"unsafe\"")];
    enforce(unsafe_code, &bad, &good);
}

#[test]
fn names_say_something() {
    let types = ["pub(crate) struct AManager;", "trait AHandler {}", "fn get_size(&self) {}"];
    let files = [("src/blob/utils.rs", ""), ("tests/common/mod.rs", "")];
    let bad = [types.map(|text| (FILE, text)).as_slice(), &files].concat();
    enforce(names, &bad, &[(FILE, "fn gets() { map.get_mut(1); } struct Managers; // fn get_x")]);
}

#[test]
fn the_product_neither_panics_nor_prints() {
    let bad = [(FILE, "a.unwrap();"), (FILE, "std::panic!()"), (FILE, "eprintln!()")];
    let more = [("tests/a.rs", "dbg!(a)"), (FILE, "#[cfg(test)]\nfn a() {}\nfn b() { print!() }")];
    let test = "// panic!\na.unwrap_or(\"panic!\");\n#[cfg(test)]\nfn a() { b.unwrap() }";
    let good = [(FILE, test), ("src/cli/a.rs", "println!()"), ("tests/a.rs", "panic!()")];
    enforce(panics_and_prints, &[bad.as_slice(), &more].concat(), &good);
}

#[test]
fn nothing_is_left_over() {
    let bad = [concat!("// TO", "DO: later"), concat!("#[ig", "nore]"), concat!("// (XX", "X)")];
    enforce(leftovers, &bad.map(|text| (FILE, text)), &[(FILE, "// mktemp -d a.XXXXXX TODOS")]);
}

#[test]
fn nothing_is_global() {
    let bad = ["thread_local! {}", "static mut A: u8 = 0;", "static A: LazyLock<u8> = b();"];
    let more = [(FILE, "static A: AtomicU8 = AtomicU8::new(0);"), ("tests/a.rs", bad[2])];
    let good = [(FILE, "fn a(b: &'static Mutex<u8>) {}"), ("tests/a.rs", "static A: AtomicU8")];
    enforce(globals, &[bad.map(|text| (FILE, text)).as_slice(), &more].concat(), &good);
}

#[test]
fn tests_do_not_sleep() {
    let poll = format!("thread::sleep(STEP); {POLLING_MARK}");
    let twice = format!("{poll}\n{poll}");
    let bad = [("tests/a.rs", "std::thread::sleep(STEP);"), ("tests/a.rs", &twice)];
    enforce(sleeps, &bad, &[("tests/a.rs", &poll), ("tools/a/main.rs", "thread::sleep(STEP)")]);
}
