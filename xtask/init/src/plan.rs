//! What a guest must do: a text file, one thing a line.

use std::fmt;
use std::str::FromStr;

/// Where the plan lies in the guest.
const PATH: &str = "/plan";

/// What a guest must do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The terminal behind /dev/console, without `/dev/`.
    pub console: String,
    /// Kernel modules to load, in this order.
    pub modules: Vec<String>,
    /// Huge pages to reserve.
    pub huge_pages: usize,
    /// Bytes of compressed memory to swap to.
    pub swap: u64,
    /// Seconds that a binary may run.
    pub limit: u64,
    /// What each program gets on its command line.
    pub arguments: Vec<String>,
    /// As whom to run what.
    pub passes: Vec<Pass>,
    /// Whether to give a shell instead of running anything.
    pub shell: bool,
}

/// As whom which binaries are run, and what they are told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pass {
    /// As whom.
    pub user: User,
    /// Programs to run.
    pub binaries: Vec<String>,
    /// Environment variables: name and value.
    pub environment: Vec<(String, String)>,
}

/// As whom a program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum User {
    /// The superuser.
    Root,
    /// A user without any rights.
    Nobody,
}

impl User {
    /// The number of the user, and of its group.
    #[must_use]
    pub const fn id(self) -> u32 {
        match self {
            User::Root => 0,
            User::Nobody => 65534,
        }
    }
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            User::Root => "root",
            User::Nobody => "nobody",
        })
    }
}

impl FromStr for User {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "root" => Ok(User::Root),
            "nobody" => Ok(User::Nobody),
            _ => Err(format!("no user `{text}`")),
        }
    }
}

impl Plan {
    /// Where the plan lies in the guest.
    pub const PATH: &str = PATH;
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "console {}", self.console)?;
        self.modules.iter().try_for_each(|module| writeln!(f, "module {module}"))?;
        writeln!(f, "huge-pages {}\nswap {}\nlimit {}", self.huge_pages, self.swap, self.limit)?;
        self.arguments.iter().try_for_each(|argument| writeln!(f, "argument {argument}"))?;
        for pass in &self.passes {
            writeln!(f, "pass {}", pass.user)?;
            pass.binaries.iter().try_for_each(|binary| writeln!(f, "binary {binary}"))?;
            pass.environment.iter().try_for_each(|(name, value)| writeln!(f, "set {name}={value}"))?;
        }
        if self.shell { writeln!(f, "shell yes") } else { Ok(()) }
    }
}

impl FromStr for Plan {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut plan = Plan::default();
        for line in text.lines() {
            let wrong = || format!("{PATH}: `{line}` is not understood");
            let (key, value) = line.split_once(' ').ok_or_else(wrong)?;
            let number = || value.parse::<u64>().map_err(|e| format!("{PATH}: `{line}`: {e}"));
            match key {
                "console" => plan.console = value.to_owned(),
                "module" => plan.modules.push(value.to_owned()),
                "huge-pages" => plan.huge_pages = usize::try_from(number()?).map_err(|_| wrong())?,
                "swap" => plan.swap = number()?,
                "limit" => plan.limit = number()?,
                "binary" => plan.passes.last_mut().ok_or_else(wrong)?.binaries.push(value.to_owned()),
                "argument" => plan.arguments.push(value.to_owned()),
                "pass" => {
                    let (user, binaries, environment) = (value.parse()?, Vec::new(), Vec::new());
                    plan.passes.push(Pass { user, binaries, environment });
                }
                "set" => {
                    let pass = plan.passes.last_mut().ok_or_else(wrong)?;
                    let (name, value) = value.split_once('=').ok_or_else(wrong)?;
                    pass.environment.push((name.to_owned(), value.to_owned()));
                }
                "shell" => plan.shell = true,
                _ => return Err(wrong()),
            }
        }
        Ok(plan)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plan_is_read_as_it_was_written() {
        let variables = [("A".to_owned(), "b=c,d".to_owned()), ("E".to_owned(), String::new())];
        let plan = Plan {
            console: "ttyS0".to_owned(),
            modules: vec!["/modules/one.ko".to_owned(), "/modules/two.ko.xz".to_owned()],
            huge_pages: 3,
            swap: 1 << 40,
            limit: 5,
            arguments: vec!["--exact".to_owned(), "a b".to_owned()],
            passes: vec![
                Pass { user: User::Root, binaries: Vec::new(), environment: variables.to_vec() },
                Pass {
                    user: User::Nobody,
                    binaries: vec!["/tests/with space".to_owned()],
                    environment: Vec::new(),
                },
            ],
            shell: true,
        };
        assert_eq!(plan.to_string().parse(), Ok(plan));
    }

    #[test]
    fn unknown_line_is_named() {
        let error = |text: &str| text.parse::<Plan>().unwrap_err();
        assert!(error("console ttyS0\nhurry\n").contains("`hurry`"));
        assert!(error("limit soon\n").contains("`limit soon`"));
        assert!(error("pass everybody\n").contains("`everybody`"));
        assert!(error("set A=b\n").contains("`set A=b`"));
        assert!(error("binary b\n").contains("`binary b`"));
    }
}
