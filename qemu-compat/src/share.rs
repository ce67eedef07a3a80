//! What is for one machine of several.

use std::str::FromStr;

/// The NUMBERth of so many machines, `1/1` being all of the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    number: usize,
    of: usize,
}

impl Share {
    /// What is for this machine.
    pub fn of<T>(self, all: impl IntoIterator<Item = T>) -> impl Iterator<Item = T> {
        all.into_iter().skip(self.number - 1).step_by(self.of)
    }
}

impl FromStr for Share {
    type Err = String;

    /// From `NUMBER/OF`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let numbers = text.split_once('/').map(|(number, of)| (number.parse(), of.parse()));
        match numbers {
            Some((Ok(number), Ok(of))) if (1..=of).contains(&number) => Ok(Self { number, of }),
            _ => Err("it must be NUMBER/OF, from 1/1 on".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shares_together_are_all_and_each_once() {
        let shares = ["1/3", "2/3", "3/3"].map(|text| text.parse::<Share>().unwrap());
        assert_eq!(
            shares.map(|share| share.of(0..8).collect::<Vec<_>>()),
            [vec![0, 3, 6], vec![1, 4, 7], vec![2, 5]]
        );
        assert!("1/1".parse::<Share>().unwrap().of(0..8).eq(0..8));
        for wrong in ["", "1", "0/1", "2/1", "1/0", "a/b", "1/2/3", "-1/2"] {
            assert!(wrong.parse::<Share>().is_err(), "{wrong}");
        }
    }
}
