//! Which names a source file takes from other files of its crate, read from its tokens.
//!
//! Types are not inferred: a method that is called on a value whose type is not named is not seen.
//! What stands under `cfg(test)` is left out.

use std::collections::BTreeSet;
use std::iter::Peekable;

use anyhow::{Result, anyhow};
use proc_macro2::{Delimiter, Group, TokenStream, TokenTree};

/// Names of modules and of an item, from the root of the crate.
pub type Path = Vec<String>;

/// One name of a `use`.
#[derive(Debug, PartialEq, Eq)]
pub struct Import {
    /// What it is called here; none for `*`.
    pub name: Option<String>,
    pub path: Path,
    /// `pub use`: it is passed on.
    pub is_passed_on: bool,
}

#[derive(Debug, Default)]
pub struct Names {
    /// Files that this one declares to be modules.
    pub children: Vec<Path>,
    pub imports: Vec<Import>,
    /// Paths that stand in the code, outside of `use`.
    pub mentions: Vec<Path>,
    /// Every word outside of `use`.
    pub words: BTreeSet<String>,
}

/// Reads the text of the file that is `module`.
pub fn read(module: &[String], text: &str) -> Result<Names> {
    let tokens: TokenStream = text.parse().map_err(|error| anyhow!("{error}"))?;
    let mut names = Names::default();
    names.read(module, tokens);
    Ok(names)
}

type Tokens = Peekable<proc_macro2::token_stream::IntoIter>;

impl Names {
    fn read(&mut self, module: &[String], tokens: TokenStream) {
        let mut tokens = tokens.into_iter().peekable();
        let mut is_public = false;
        let mut before = String::new();
        while let Some(token) = tokens.next() {
            match &token {
                TokenTree::Group(group) if before == "#" && is_for_tests(group) => {
                    skip_item(&mut tokens);
                }
                TokenTree::Group(group) if before == "pub" && says_who_may_see(group) => continue,
                TokenTree::Group(group) => self.read(module, group.stream()),
                TokenTree::Ident(word) if word == "use" && !is_mark(tokens.peek(), '<') => {
                    let tree = Tree::read(&mut tokens);
                    tree.flatten(&[], &mut |path, name| {
                        self.imports.push(Import {
                            name,
                            path: from_root(module, path),
                            is_passed_on: is_public,
                        });
                    });
                }
                TokenTree::Ident(word) if word == "mod" => self.module(module, &mut tokens),
                TokenTree::Ident(word) if !matches!(before.as_str(), "::" | ".") => {
                    let mut path = vec![word.to_string()];
                    while let Some(next) = next_of_path(&mut tokens) {
                        path.push(next);
                    }
                    self.words.extend(path.iter().cloned());
                    if path.len() > 1 {
                        self.mentions.push(from_root(module, &path));
                    }
                }
                TokenTree::Ident(word) => {
                    self.words.insert(word.to_string());
                }
                _ => {}
            }
            is_public = matches!(&token, TokenTree::Ident(word) if word == "pub");
            before = match &token {
                TokenTree::Punct(mark) if mark.as_char() == ':' && before == ":" => "::".into(),
                other => other.to_string(),
            };
        }
    }

    /// What comes after `mod`: a file, or code between braces.
    fn module(&mut self, module: &[String], tokens: &mut Tokens) {
        let Some(TokenTree::Ident(name)) = tokens.next() else {
            return;
        };
        let inner = [module, &[name.to_string()]].concat();
        match tokens.next() {
            Some(TokenTree::Group(body)) => self.read(&inner, body.stream()),
            _ => self.children.push(inner),
        }
    }
}

fn is_for_tests(attribute: &Group) -> bool {
    attribute.to_string().replace(' ', "") == "[cfg(test)]"
}

/// Leaves out the item behind an attribute: to its semicolon, or to its body in braces.
fn skip_item(tokens: &mut Tokens) {
    let mut is_use = false;
    for token in tokens {
        match token {
            TokenTree::Punct(mark) if mark.as_char() == ';' => return,
            TokenTree::Group(body) if !is_use && body.delimiter() == Delimiter::Brace => return,
            TokenTree::Ident(word) => is_use |= word == "use",
            _ => {}
        }
    }
}

/// `pub(super)`, `pub(in crate::a)`: they use nothing.
fn says_who_may_see(group: &Group) -> bool {
    let mut inner = group.stream().into_iter();
    let first = inner.next().map(|word| word.to_string());
    match first.as_deref() {
        Some("in") => true,
        Some("crate" | "super" | "self") => inner.next().is_none(),
        _ => false,
    }
}

fn is_mark(token: Option<&TokenTree>, mark: char) -> bool {
    matches!(token, Some(TokenTree::Punct(found)) if found.as_char() == mark)
}

fn take_mark(tokens: &mut Tokens, mark: char) -> bool {
    tokens.next_if(|token| is_mark(Some(token), mark)).is_some()
}

/// The word behind `::`, if that comes next.
fn next_of_path(tokens: &mut Tokens) -> Option<String> {
    let mut ahead = tokens.clone();
    if !(take_mark(&mut ahead, ':') && take_mark(&mut ahead, ':')) {
        return None;
    }
    let Some(TokenTree::Ident(word)) = ahead.next() else {
        return None;
    };
    *tokens = ahead;
    Some(word.to_string())
}

/// What stands between `use` and its semicolon, or between two commas within it.
#[derive(Default)]
struct Tree {
    path: Vec<String>,
    name: Option<String>,
    branches: Option<Vec<Tree>>,
}

impl Tree {
    fn read(tokens: &mut Tokens) -> Tree {
        let mut tree = Tree::default();
        while let Some(token) = tokens.next() {
            match token {
                TokenTree::Ident(word) if word == "as" => {
                    tree.name = tokens.next().map(|name| name.to_string());
                }
                TokenTree::Ident(word) => tree.path.push(word.to_string()),
                TokenTree::Group(group) => {
                    let mut inner = group.stream().into_iter().peekable();
                    let mut branches = Vec::new();
                    while inner.peek().is_some() {
                        branches.push(Tree::read(&mut inner));
                    }
                    tree.branches = Some(branches);
                }
                TokenTree::Punct(mark) if matches!(mark.as_char(), ';' | ',') => break,
                TokenTree::Punct(mark) if mark.as_char() == '*' => tree.path.push("*".into()),
                _ => {}
            }
        }
        tree
    }

    fn flatten(&self, above: &[String], found: &mut dyn FnMut(&[String], Option<String>)) {
        let mut path = [above, &self.path].concat();
        if let Some(branches) = &self.branches {
            branches.iter().for_each(|tree| tree.flatten(&path, found));
            return;
        }
        if path.last().is_some_and(|last| last == "self") && path.len() > 1 {
            path.pop();
        }
        if path.last().is_some_and(|last| last == "*") {
            path.pop();
            return found(&path, None);
        }
        let name = self.name.clone().or_else(|| path.last().cloned());
        found(&path, name);
    }
}

/// A path that `module` says, said from the root. One that begins with another word is taken for
/// one of the module's own, which is looked up later.
fn from_root(module: &[String], path: &[String]) -> Path {
    let mut place = module.to_vec();
    let mut rest = path;
    if let Some((first, behind)) = rest.split_first()
        && first == "crate"
    {
        place.clear();
        rest = behind;
    }
    while let Some((first, behind)) = rest.split_first()
        && matches!(first.as_str(), "self" | "super")
    {
        if first == "super" {
            place.pop();
        }
        rest = behind;
    }
    place.extend_from_slice(rest);
    place
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(path: &str) -> Path {
        path.split("::")
            .filter(|word| !word.is_empty())
            .map(String::from)
            .collect()
    }

    fn names(module: &str, text: &str) -> Names {
        read(&words(module), text).expect(text)
    }

    fn imports(module: &str, text: &str) -> Vec<String> {
        let show = |import: Import| {
            let name = import.name.unwrap_or_else(|| "*".into());
            format!("{} as {name}", import.path.join("::"))
        };
        names(module, text).imports.into_iter().map(show).collect()
    }

    #[test]
    fn trees_of_imports() {
        let text = "use crate::{a::{self, B as C, d::*}, e}; pub(super) use super::f::G;";
        let found = imports("x::y", text);
        let expected = ["a as a", "a::B as C", "a::d as *", "e as e", "x::f::G as G"];
        assert_eq!(found, expected);
        assert_eq!(
            imports("x", "use self::y::Z; use super::*;"),
            ["x::y::Z as Z", " as *"]
        );
    }

    #[test]
    fn what_is_passed_on_is_told_from_what_is_used() {
        let found = names(
            "",
            "pub use a::A; pub(crate) use b::B; use c::C; pub fn f() {}",
        );
        let is_passed_on: Vec<_> = found.imports.iter().map(|it| it.is_passed_on).collect();
        assert_eq!(is_passed_on, [true, true, false]);
    }

    #[test]
    fn paths_in_code() {
        let text = r#"
            //! crate::comment::a
            pub(in crate::visibility) fn f(x: &crate::a::B) -> Vec<super::c::D> {
                let text = "crate::string::E";
                vec![self::e::f(x), g::<crate::h::I>()].crate_like::<u8>()
            }
        "#;
        let found = names("m", text).mentions;
        let expected = ["a::B", "c::D", "m::e::f", "h::I"].map(words);
        assert_eq!(found, expected);
    }

    #[test]
    fn modules_of_a_file_and_within_it() {
        let found = names("m", "pub mod a; mod b { use super::c::D; mod e; }");
        assert_eq!(found.children, ["m::a", "m::b::e"].map(words));
        assert_eq!(found.imports[0].path, words("m::c::D"));
    }

    #[test]
    fn tests_do_not_count() {
        let text = "
            #[cfg(test)] use crate::a::{B, C};
            #[cfg(test)] #[allow(dead_code)] mod tests { use crate::d::E; }
            #[cfg(test)] mod more;
            #[cfg(unix)] use crate::f::G;
        ";
        assert_eq!(imports("", text), ["f::G as G"]);
        assert!(names("", text).children.is_empty());
    }

    #[test]
    fn words_outside_of_imports() {
        let found = names("", "pub use a::{A, B}; fn f(a: B) {}").words;
        assert!(found.contains("B") && !found.contains("A"), "{found:?}");
    }
}
