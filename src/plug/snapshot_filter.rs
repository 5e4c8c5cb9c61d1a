//! containerd's filter language, for lists of snapshots.
//!
//! `kind==committed,labels."a.b"~=^x` is a list of selectors that must all match; a list of such
//! filters matches when one of them does; no filter matches everything. A selector without an
//! operator asks for presence. Grammar: containerd's `filters/parser.go`. Input is hostile:
//! lengths are bounded and patterns run in linear time.

use regex_lite::Regex;

use crate::config::{FILTER_MAX_BYTES, FILTERS_MAX};
use crate::error::{Error, Result};

/// Filters, one of which must match.
#[derive(Debug)]
pub struct Filters(Vec<Vec<Selector>>);

#[derive(Debug)]
struct Selector {
    path: Vec<String>,
    test: Test,
}

#[derive(Debug)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
    Matches(Regex),
}

impl Filters {
    /// Parses what a client sent.
    pub fn parse(texts: &[String]) -> Result<Filters> {
        if texts.len() > FILTERS_MAX {
            return Err(Error::Malformed(format!(
                "{} filters; {FILTERS_MAX} at most",
                texts.len()
            )));
        }
        let parse = |text: &String| match text.len() <= FILTER_MAX_BYTES {
            true => Parser { text, at: 0 }.selectors(),
            false => Err(Error::Malformed(format!("a filter of {} bytes", text.len()))),
        };
        texts.iter().map(parse).collect::<Result<Vec<_>>>().map(Filters)
    }

    /// Whether something matches; `field` looks up the value at a path, if there is one.
    pub fn matches<'a>(&self, field: impl Fn(&[String]) -> Option<&'a str>) -> bool {
        let all = |selectors: &Vec<Selector>| {
            selectors.iter().all(|selector| selector.matches(field(&selector.path)))
        };
        self.0.is_empty() || self.0.iter().any(all)
    }
}

impl Selector {
    /// As in containerd: to != and ~= an absent value is an empty one.
    fn matches(&self, value: Option<&str>) -> bool {
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(wanted) => value.is_some_and(|value| value == wanted),
            Test::NotEqual(wanted) => value.unwrap_or("") != wanted,
            Test::Matches(pattern) => pattern.is_match(value.unwrap_or("")),
        }
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

impl Parser<'_> {
    /// An empty text is a filter that matches everything: a conjunction of nothing.
    fn selectors(mut self) -> Result<Vec<Selector>> {
        let mut selectors = Vec::new();
        if self.text.is_empty() {
            return Ok(selectors);
        }
        loop {
            selectors.push(self.selector()?);
            self.skip_space();
            match self.peek() {
                None => return Ok(selectors),
                Some(',') => self.at += 1,
                Some(_) => return Err(self.wrong("a comma or the end was expected")),
            }
        }
    }

    fn selector(&mut self) -> Result<Selector> {
        let mut path = vec![self.field()?];
        while self.peek() == Some('.') {
            self.at += 1;
            path.push(self.field()?);
        }
        self.skip_space();
        let operator = self.take_while(|c| "=!~".contains(c));
        let test = match operator {
            "" => Test::Present,
            "==" => Test::Equal(self.value()?),
            "!=" => Test::NotEqual(self.value()?),
            "~=" => Test::Matches(self.pattern()?),
            _ => return Err(self.wrong("only ==, != and ~= are operators")),
        };
        Ok(Selector { path, test })
    }

    fn field(&mut self) -> Result<String> {
        self.skip_space();
        if let Some(quoted) = self.quoted()? {
            return Ok(quoted);
        }
        match self.take_while(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-') {
            "" => Err(self.wrong("a field's name was expected")),
            field => Ok(field.to_owned()),
        }
    }

    fn value(&mut self) -> Result<String> {
        self.skip_space();
        if let Some(quoted) = self.quoted()? {
            return Ok(quoted);
        }
        match self.take_while(|c| c != ',' && !c.is_whitespace() && !c.is_control()) {
            "" => Err(self.wrong("a value was expected")),
            value => Ok(value.to_owned()),
        }
    }

    fn pattern(&mut self) -> Result<Regex> {
        let pattern = self.value()?;
        Regex::new(&pattern).map_err(|error| self.wrong(&format!("the pattern: {error}")))
    }

    /// A Go string between double quotes, or a pattern between slashes or bars, where a backslash
    /// stands for itself unless it hides the delimiter.
    fn quoted(&mut self) -> Result<Option<String>> {
        let Some(quote) = self.peek().filter(|c| ['"', '/', '|'].contains(c)) else {
            return Ok(None);
        };
        self.at += 1;
        let mut value = String::new();
        loop {
            match self.next() {
                None | Some('\n') => return Err(self.wrong("a quoted text does not end")),
                Some(c) if c == quote => return Ok(Some(value)),
                Some('\\') if quote == '"' => value.push(self.escaped()?),
                Some('\\') if self.peek() == Some(quote) => {
                    self.at += 1;
                    value.push(quote);
                }
                Some(c) => value.push(c),
            }
        }
    }

    fn escaped(&mut self) -> Result<char> {
        let digits = match self.next() {
            Some('a') => return Ok('\x07'),
            Some('b') => return Ok('\x08'),
            Some('f') => return Ok('\x0c'),
            Some('n') => return Ok('\n'),
            Some('r') => return Ok('\r'),
            Some('t') => return Ok('\t'),
            Some('v') => return Ok('\x0b'),
            Some(c @ ('\\' | '"')) => return Ok(c),
            Some('x') => 2,
            Some('u') => 4,
            Some('U') => 8,
            _ => return Err(self.wrong("an escape sequence nobody knows")),
        };
        let end = self.at + digits;
        let code = self.text.get(self.at..end).and_then(|hex| u32::from_str_radix(hex, 16).ok());
        let character = code.and_then(char::from_u32);
        self.at = end;
        character.ok_or_else(|| Error::Malformed(format!("filter {:?}: no character", self.text)))
    }

    fn skip_space(&mut self) {
        self.take_while(char::is_whitespace);
    }

    fn take_while(&mut self, wanted: impl Fn(char) -> bool) -> &str {
        let rest = &self.text[self.at..];
        let end = rest.find(|c| !wanted(c)).unwrap_or(rest.len());
        self.at += end;
        &rest[..end]
    }

    fn peek(&self) -> Option<char> {
        self.text[self.at..].chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let next = self.peek();
        self.at += next.map_or(0, char::len_utf8);
        next
    }

    fn wrong(&self, why: &str) -> Error {
        Error::Malformed(format!("filter {:?}, at byte {}: {why}", self.text, self.at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A snapshot called `k/1/base` with the label `a.b/c` = `1,2`.
    fn matches(filters: &[&str]) -> Result<bool> {
        let texts: Vec<String> = filters.iter().map(|text| (*text).to_owned()).collect();
        Ok(Filters::parse(&texts)?.matches(|path| match path {
            [name] if name == "name" => Some("k/1/base"),
            [labels, label] if labels == "labels" && label == "a.b/c" => Some("1,2"),
            _ => None,
        }))
    }

    #[test]
    fn operators_compare_what_is_there() {
        for good in [
            "",
            "name",
            "name==k/1/base",
            "name != other",
            "name~=^k/[0-9]+/",
            r#"labels."a.b/c"=="1,2""#,
            r#"labels."a.b/c"=="1\x2c2",name"#,
            "name~=/base$/",
            r"name~=|k/1\/base|",
            "absent!=1",
            r#" name == "k/1/base" , labels."a.b/c" "#,
        ] {
            assert_eq!(matches(&[good]), Ok(true), "{good}");
        }
        for bad in ["absent", "absent==", "name==k", "name~=^b", "name,absent", "labels.x~=a"] {
            assert_ne!(matches(&[bad]), Ok(true), "{bad}");
        }
    }

    #[test]
    fn one_of_several_filters_is_enough_and_none_matches_all() {
        assert_eq!(matches(&[]), Ok(true));
        assert_eq!(matches(&["absent", "name"]), Ok(true));
        assert_eq!(matches(&["absent", "name==x"]), Ok(false));
    }

    #[test]
    fn what_containerd_asks_for_remote_layers_is_understood() {
        let chain = "sha256:5bef08742407efd622d243692b79ba0055383bbce12900324f75e56f589aedb0";
        let text = format!("labels.\"containerd.io/snapshot.ref\"=={chain},parent==\"k8s.io/1/x\"");
        let filters = Filters::parse(&[text]).unwrap();
        let found = |reference: &'static str, parent: &'static str| {
            filters.matches(|path| match path {
                [parent_field] if parent_field == "parent" => Some(parent),
                [_, label] if label == "containerd.io/snapshot.ref" => Some(reference),
                _ => None,
            })
        };
        let chain: &'static str = chain.to_owned().leak();
        assert!(found(chain, "k8s.io/1/x"));
        assert!(!found(chain, "k8s.io/1/y") && !found("sha256:5b", "k8s.io/1/x"));
    }

    #[test]
    fn nonsense_is_refused_with_its_place() {
        for text in [
            ",",
            "name,",
            "name=",
            "name=x",
            "name===x",
            "name==",
            "==x",
            "name x",
            "a..b",
            ".a",
            "name==\"x",
            "name==\"\\q\"",
            "name==\"\\x4\"",
            "name~=(",
            "é",
            "name==\"\\ud800\"",
        ] {
            let error = matches(&[text]).expect_err(text);
            assert!(error.to_string().contains("filter "), "{error}");
        }
        assert!(matches(&[&"a".repeat(FILTER_MAX_BYTES + 1)]).is_err());
        assert!(matches(&vec!["name"; FILTERS_MAX + 1]).is_err());
    }
}
