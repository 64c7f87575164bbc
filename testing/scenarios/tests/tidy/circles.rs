//! No circle between files of a crate.
//!
//! A file uses another of its crate when it names something of it, in a `use` or within the code;
//! a name that a file in between passes on (`pub use`) counts for where it comes from. To declare a
//! module (`mod a;`) and to pass its names on is no use of it.
//!
//! A module and the files beneath it are one thing that was cut into parts, and the language lets
//! the parts see what is private to the whole: they may use their parent, and it them. But they may
//! not go round among themselves, and no circle may lead through anything outside: where a parent
//! uses a stranger, the stranger may use neither it nor its parts. What stands under `cfg(test)`
//! does not count.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};

use super::names::{self, Names, Path};

/// References are followed so far; longer ones are passed on in a circle.
const STEPS_MAX: usize = 16;

/// The files of one crate, by module.
struct Crate {
    files: BTreeMap<Path, (String, Names)>,
}

/// The circles of the crate whose root is the file `root` of `sources` (path and text): each as the
/// files that can be reached from one another, with the name by which each reaches the next.
pub fn of_crate(root: &str, sources: &BTreeMap<String, String>) -> Result<Vec<Circle>> {
    let found = Crate::read(root, sources)?;
    Ok(found.circles())
}

#[derive(Debug, PartialEq, Eq)]
pub struct Circle {
    pub files: Vec<String>,
    /// `file uses name of file`, for each use within the circle.
    pub uses: Vec<String>,
}

impl Crate {
    fn read(root: &str, sources: &BTreeMap<String, String>) -> Result<Crate> {
        let directory = root.rsplit_once('/').map_or("", |(directory, _)| directory);
        let mut files = BTreeMap::new();
        let mut waiting = vec![(Path::new(), root.to_string())];
        while let Some((module, file)) = waiting.pop() {
            let text = sources.get(&file).with_context(|| format!("no {file}"))?;
            let names = names::read(&module, text).with_context(|| file.clone())?;
            for child in &names.children {
                let path = format!("{directory}/{}", child.join("/"));
                let path = path.trim_start_matches('/');
                let places = [format!("{path}.rs"), format!("{path}/mod.rs")];
                let place = places.iter().find(|place| sources.contains_key(*place));
                let place = place.with_context(|| format!("{file}: no module {path}"))?;
                waiting.push((child.clone(), place.clone()));
            }
            files.insert(module, (file, names));
        }
        Ok(Crate { files })
    }

    /// The module whose file has the item that `path` leads to; none for what is not of this crate.
    fn resolve<'a>(&'a self, module: &Path, path: &[String], steps: usize) -> Option<&'a Path> {
        let is_file = |length: &usize| self.files.contains_key(&path[..*length]);
        let length = (0..=path.len()).rev().find(is_file)?;
        let (owner, (_, names)) = self.files.get_key_value(&path[..length])?;
        let Some(name) = path.get(length) else {
            return Some(owner);
        };
        let import = names.imports.iter().find(|import| {
            import.name.as_ref() == Some(name) && import.path[..] != path[..=length]
        });
        match (import, steps.checked_sub(1)) {
            (Some(import), Some(steps)) => {
                let path = [&import.path, &path[length + 1..]].concat();
                self.resolve(module, &path, steps)
            }
            // A word that the module does not have: another crate, or a type's own item.
            _ => (owner != module).then_some(owner),
        }
    }

    /// What the file of `module` uses: other files, and a name by which it does.
    fn uses<'a>(&'a self, module: &Path) -> BTreeMap<&'a Path, String> {
        let (_, names) = &self.files[module];
        let is_used = |name: &Option<String>| match name {
            Some(name) => names.words.contains(name),
            None => true,
        };
        let imports = names
            .imports
            .iter()
            .filter(|import| !import.is_passed_on || is_used(&import.name))
            .map(|import| &import.path);
        let mut found = BTreeMap::new();
        for path in imports.chain(&names.mentions) {
            if let Some(file) = self.resolve(module, path, STEPS_MAX)
                && file != module
            {
                found.entry(file).or_insert_with(|| path.join("::"));
            }
        }
        found
    }

    fn circles(&self) -> Vec<Circle> {
        let uses: Uses<'_> = self.files.keys().map(|it| (it, self.uses(it))).collect();
        let mut circles = Vec::new();
        let mut waiting = vec![self.files.keys().collect::<BTreeSet<_>>()];
        while let Some(among) = waiting.pop() {
            for mut together in knots(&among, &uses) {
                let contains_all = |it: &&&Path| together.iter().all(|other| other.starts_with(it));
                match together.iter().find(contains_all).copied() {
                    Some(parent) => {
                        together.remove(parent);
                        waiting.push(together);
                    }
                    None => circles.push(self.circle(&together, &uses)),
                }
            }
        }
        circles
    }

    fn circle(&self, together: &BTreeSet<&Path>, uses: &Uses<'_>) -> Circle {
        let file = |module: &Path| self.files[module].0.clone();
        let mut told = Vec::new();
        for from in together {
            for (to, name) in uses[from].iter().filter(|(to, _)| together.contains(*to)) {
                told.push(format!("{} uses {name} of {}", file(from), file(to)));
            }
        }
        Circle {
            files: together.iter().map(|module| file(module)).collect(),
            uses: told,
        }
    }
}

/// What each file uses, and a name by which it does.
type Uses<'a> = BTreeMap<&'a Path, BTreeMap<&'a Path, String>>;

/// The largest sets within `among` of files that can all be reached from one another in it.
fn knots<'a>(among: &BTreeSet<&'a Path>, uses: &Uses<'a>) -> Vec<BTreeSet<&'a Path>> {
    let reached: BTreeMap<&Path, _> = among
        .iter()
        .map(|it| (*it, reach(it, among, uses)))
        .collect();
    let mut knots: Vec<BTreeSet<&Path>> = Vec::new();
    for (module, from_here) in &reached {
        let is_tied = from_here.contains(module);
        if is_tied && !knots.iter().any(|knot| knot.contains(module)) {
            let leads_back = |other: &&&Path| reached[**other].contains(module);
            knots.push(from_here.iter().filter(leads_back).copied().collect());
        }
    }
    knots
}

/// All that can be reached from `start` in one step or more.
fn reach<'a>(start: &Path, among: &BTreeSet<&'a Path>, uses: &Uses<'a>) -> BTreeSet<&'a Path> {
    let next = |module: &Path| uses[module].keys().copied().filter(|it| among.contains(it));
    let mut reached = BTreeSet::new();
    let mut waiting: Vec<&Path> = next(start).collect();
    while let Some(module) = waiting.pop() {
        if reached.insert(module) {
            waiting.extend(next(module));
        }
    }
    reached
}

#[cfg(test)]
mod tests {
    use super::*;

    fn circles(sources: &[(&str, &str)]) -> Vec<Vec<String>> {
        let sources = sources
            .iter()
            .map(|(file, text)| (file.to_string(), text.to_string()))
            .collect();
        let found = of_crate("lib.rs", &sources).expect("read");
        found.into_iter().map(|circle| circle.files).collect()
    }

    #[test]
    fn two_files_that_use_each_other() {
        let found = circles(&[
            ("lib.rs", "mod a; mod b; mod c;"),
            ("a.rs", "use crate::b::B; pub struct A;"),
            ("b.rs", "pub fn b(_: &super::a::A) {} pub struct B;"),
            ("c.rs", "use crate::{a::A, b::B};"),
        ]);
        assert_eq!(found, [["a.rs", "b.rs"]]);
    }

    #[test]
    fn a_long_way_round() {
        let found = circles(&[
            ("lib.rs", "mod a; mod b; mod c;"),
            ("a.rs", "use super::b::{self, Other as B};"),
            ("b/mod.rs", "mod d; use crate::c::C; pub struct Other;"),
            ("b/d.rs", "pub struct D;"),
            ("c.rs", "fn c() { crate::a::a() }"),
        ]);
        assert_eq!(found, [["a.rs", "b/mod.rs", "c.rs"]]);
    }

    #[test]
    fn a_parent_may_declare_pass_on_and_use_its_children() {
        let found = circles(&[
            ("lib.rs", "mod a; pub use a::B;"),
            (
                "a/mod.rs",
                "mod b; mod c; pub use b::B; fn a() -> c::C { c::make() }",
            ),
            ("a/b.rs", "use super::c::C; pub struct B;"),
            ("a/c.rs", "pub struct C;"),
        ]);
        assert_eq!(found, Vec::<Vec<String>>::new());
    }

    #[test]
    fn a_parent_and_its_children_may_use_each_other() {
        let of_item = ("a/b.rs", "use super::Item; pub struct B(Item);");
        for parent in [
            "mod b; use b::B; pub struct Item; fn f(_: B) {}",
            "mod b; pub use b::B; pub struct Item; fn f(_: B) {}",
            "mod b; pub struct Item; fn f() { b::make() }",
        ] {
            let found = circles(&[("lib.rs", "mod a;"), ("a/mod.rs", parent), of_item]);
            assert_eq!(found, Vec::<Vec<String>>::new(), "{parent}");
        }
    }

    #[test]
    fn children_do_not_go_round_behind_their_parent() {
        let found = circles(&[
            ("lib.rs", "mod a;"),
            (
                "a/mod.rs",
                "mod b; mod c; use b::B; pub struct Item; fn a(_: B) {}",
            ),
            ("a/b.rs", "use super::{Item, c::C}; pub struct B;"),
            ("a/c.rs", "use super::b::B; pub struct C;"),
        ]);
        assert_eq!(found, [["a/b.rs", "a/c.rs"]]);
    }

    #[test]
    fn a_stranger_that_a_parent_uses_does_not_use_its_children() {
        let found = circles(&[
            ("lib.rs", "mod a; mod s;"),
            ("a/mod.rs", "mod b; use crate::s::S; pub struct Item;"),
            ("a/b.rs", "use super::Item; pub struct B;"),
            ("s.rs", "use crate::a::b::B; pub struct S;"),
        ]);
        assert_eq!(found, [["a/mod.rs", "a/b.rs", "s.rs"]]);
    }

    #[test]
    fn a_name_that_is_passed_on_counts_for_where_it_comes_from() {
        let found = circles(&[
            ("lib.rs", "mod door; mod far;"),
            ("door/mod.rs", "mod inner; pub use inner::Inner as Shown;"),
            ("door/inner.rs", "use crate::far::Far; pub struct Inner;"),
            ("far.rs", "use crate::door::Shown; pub struct Far;"),
        ]);
        assert_eq!(found, [["door/inner.rs", "far.rs"]]);
    }

    #[test]
    fn siblings_meet_through_what_their_parent_passes_on() {
        let found = circles(&[
            ("lib.rs", "mod a; mod b; pub use a::A; pub use b::B;"),
            ("a.rs", "use super::B; pub struct A;"),
            ("b.rs", "use crate::A; pub struct B;"),
        ]);
        assert_eq!(found, [["a.rs", "b.rs"]]);
    }

    #[test]
    fn tests_and_strangers_do_not_count() {
        let found = circles(&[
            ("lib.rs", "mod a; mod b;"),
            (
                "a.rs",
                "use crate::b::B; use std::io; use a_crate::a; pub struct A;",
            ),
            (
                "b.rs",
                "pub struct B; #[cfg(test)] mod tests { use crate::a::A; }",
            ),
        ]);
        assert_eq!(found, Vec::<Vec<String>>::new());
    }

    #[test]
    fn a_circle_says_who_uses_what() {
        let sources = [
            ("lib.rs", "mod a; mod b;"),
            ("a.rs", "use crate::b::B;"),
            ("b.rs", "use crate::a::A;"),
        ];
        let sources = sources.map(|(file, text)| (file.to_string(), text.to_string()));
        let found = of_crate("lib.rs", &BTreeMap::from(sources)).expect("read");
        let uses = ["a.rs uses b::B of b.rs", "b.rs uses a::A of a.rs"];
        assert_eq!(found[0].uses, uses);
    }
}
